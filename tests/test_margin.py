"""classification_margin and minimal_margin_score: values, gradients, errors, compilation."""

import math
import os

import numpy as np
import pytest
import scipy.spatial
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torchmetrics.functional.classification import multiclass_hinge_loss

import brute_force
import marginops
from conftest import DTYPES, IMPLEMENTATIONS, OPS, OTHER_LIBRARY, head, implementation, opcheck
from marginops import _native
from marginops.ops._library import define
from strategies import LAYOUTS, finite, margin_cases, relayout, score_cases


def tolerance(dtype: torch.dtype) -> float:
    return 1e-12 if dtype == torch.float64 else 2e-6


def assert_matches(result: torch.Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = torch.finfo(result.dtype).max
    expected = np.where(np.abs(expected) > limit, np.copysign(np.inf, expected), expected)
    np.testing.assert_allclose(
        result.double().cpu().numpy(), expected, rtol=tolerance(dtype), atol=1e-37
    )


@pytest.mark.skipif(bool(OTHER_LIBRARY), reason="another library's kernels are under test")
@pytest.mark.skipif("MARGINOPS_DISABLE_JIT" in os.environ, reason="MARGINOPS_DISABLE_JIT is set")
def test_native_kernels_are_under_test(device):
    assert _native.load(torch.device(device).type)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=margin_cases())
def test_margin_matches_brute_force(device, which, case):
    logits, target, log_norm = case
    with implementation(which):
        result = marginops.classification_margin(
            logits.to(device), target.to(device), log_norm=log_norm
        )
    expected = brute_force.classification_margin(logits, target, log_norm or 0.0)
    assert_matches(result, expected, logits.dtype)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("rival", ["top2", "nearest"])
@given(case=score_cases())
def test_score_matches_brute_force(device, which, rival, case):
    logits, weight, bias = (value if value is None else value.to(device) for value in case)
    with implementation(which):
        result = marginops.minimal_margin_score(
            logits, weight, bias, rival=rival, bias_in_norm=bias is not None
        )
    _, expected = brute_force.minimal_margin_pair(*case, rival=rival)
    assert_matches(result, expected, logits.dtype)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=score_cases())
def test_pair_is_that_of_brute_force(device, which, case):
    logits, weight, bias = (value if value is None else value.to(device) for value in case)
    with implementation(which):
        pair, _ = marginops.ops.margin._minimal_margin_pair(logits, weight, bias, None, False)
    expected, _ = brute_force.minimal_margin_pair(*case)
    assert pair.tolist() == [list(classes) for classes in expected]


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=margin_cases(), data=st.data())
def test_rival_of_listed_rows(device, which, case, data):
    logits, target, _ = case
    indices = st.integers(0, len(logits) - 1) if len(logits) else st.nothing()
    listed = data.draw(st.lists(indices, max_size=5 if len(logits) else 0))
    rows = torch.tensor(listed, dtype=torch.int64)
    with implementation(which):
        rival = marginops.ops.margin._classification_margin_rival(
            logits.to(device), target.to(device), rows.to(device), -100
        )
    expected = []
    for row in listed:
        y, values = int(target[row]), logits[row].double().tolist()
        if y == -100:
            expected.append(0)
        elif any(math.isnan(value) for value in values):
            expected.append(int(y == 0))
        else:
            expected.append(next(c for c in brute_force.largest_two(values) if c != y))
    assert rival.tolist() == expected


@pytest.mark.parametrize("classes", [2, 10, 48, 49, 100, 1000, 8191, 8192, 8193, 20001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_around_every_boundary(device, dtype, classes, layout):
    logits = relayout(torch.randn(37, classes).mul(4).round().div(4).to(dtype), layout).to(device)
    weight = torch.randn(classes, 33).to(dtype).to(device)
    target = torch.randint(classes, (37,), device=device)
    margin = marginops.classification_margin(logits, target)
    score = marginops.minimal_margin_score(logits, weight)
    with implementation("reference"):
        assert torch.equal(margin, marginops.classification_margin(logits, target))
        expected = marginops.minimal_margin_score(logits, weight)
    torch.testing.assert_close(score, expected, rtol=tolerance(dtype), atol=0)


def test_rows_on_both_sides_of_a_table_of_distances(device):
    weight = torch.randn(20, 64, device=device)
    logits = torch.randn(1000, 20, device=device)
    table = marginops.minimal_margin_score(logits, weight)
    direct = marginops.minimal_margin_score(logits[:19], weight)
    torch.testing.assert_close(table[:19], direct, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 3e37])
def test_norms_neither_over_nor_underflow(device, scale):
    weight = torch.randn(5, 40, device=device) * scale
    logits = torch.randn(30, 5, device=device)
    score = marginops.minimal_margin_score(logits, weight)
    expected = marginops.minimal_margin_score(logits.double(), weight.double())
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=0)


def test_log_norm_beyond_the_range_of_exp(device):
    logits = torch.tensor([[1e-20, 0.0], [0.0, 0.0], [1e20, 0.0]], device=device)
    target = torch.zeros(3, dtype=torch.int64, device=device)
    margin = marginops.classification_margin(logits, target, log_norm=-100.0)
    expected = torch.tensor([1e-20 * math.exp(100), 0.0, math.inf], device=device)
    torch.testing.assert_close(margin, expected, rtol=1e-5, atol=0)
    tensor = torch.tensor(-100.0, device=device)
    assert torch.equal(margin, marginops.classification_margin(logits, target, log_norm=tensor))


def test_rows_beyond_32_bit_offsets(device):
    row = torch.randn(1, 32768, device=device)
    logits = row.expand(70_000, -1)
    assert logits.numel() > 2**31
    target = torch.zeros(70_000, dtype=torch.int64, device=device)
    margin = marginops.classification_margin(logits, target)
    assert margin.unique().tolist() == marginops.classification_margin(row, target[:1]).tolist()


def test_hinge_loss_of_torchmetrics(device):
    probabilities = torch.rand(200, 7, device=device)
    target = torch.randint(7, (200,), device=device)
    margin = marginops.classification_margin(probabilities, target)
    expected = multiclass_hinge_loss(probabilities, target, num_classes=7)
    torch.testing.assert_close((1 - margin).clamp(min=0).mean(), expected)


def test_nearest_boundary_is_where_the_features_change_class(device):
    """Moving by the score along the normal ties two classes; moving less changes nothing."""
    weight, bias = torch.randn(2, 12, 6, dtype=torch.float64).unbind()
    bias = bias[:, 0]
    features = torch.randn(50, 6, dtype=torch.float64)
    logits = features @ weight.T + bias
    score = marginops.minimal_margin_score(
        logits.to(device), weight.to(device), rival="nearest"
    ).cpu()
    first = logits.argmax(1)
    others = torch.arange(12).repeat(50, 1)
    normals = weight[others] - weight[first].unsqueeze(1)
    directions = normals / normals.norm(dim=2, keepdim=True)
    for step, changes in ((1 + 1e-6, True), (1 - 1e-6, False)):
        moved = features.unsqueeze(1) + directions.nan_to_num() * (step * score).view(-1, 1, 1)
        arrived = (moved @ weight.T + bias).argmax(2)
        assert ((arrived != first.unsqueeze(1)).any(1) == changes).all()


def test_distance_of_scipy(device):
    weight = torch.randn(9, 30, dtype=torch.float64)
    logits = torch.randn(100, 9, dtype=torch.float64)
    values, classes = logits.topk(2)
    table = scipy.spatial.distance_matrix(weight, weight)
    expected = (values[:, 0] - values[:, 1]) / table[classes[:, 0], classes[:, 1]]
    score = marginops.minimal_margin_score(logits.to(device), weight.to(device))
    torch.testing.assert_close(score.cpu(), expected)


def test_invariances_of_the_score(device):
    weight = torch.randn(8, 16, dtype=torch.float64, device=device)
    features = torch.randn(60, 16, dtype=torch.float64, device=device)
    score = marginops.minimal_margin_score(features @ weight.T, weight)
    shifted = weight + torch.randn(16, dtype=torch.float64, device=device)
    torch.testing.assert_close(marginops.minimal_margin_score(features @ shifted.T, shifted), score)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, device=device)).Q
    turned = marginops.minimal_margin_score(
        (features @ rotation) @ (weight @ rotation).T, weight @ rotation
    )
    torch.testing.assert_close(turned, score)


@pytest.mark.parametrize("rival", ["top2", "nearest"])
@pytest.mark.parametrize("bias_in_norm", [False, True])
def test_score_gradient(device, rival, bias_in_norm):
    def score(*inputs):
        return marginops.minimal_margin_score(*inputs, rival=rival, bias_in_norm=bias_in_norm)

    assert gradcheck(score, head(device))
    logits, weight, bias = head(device)
    with implementation("reference"):
        expected = torch.autograd.grad(score(logits, weight, bias).sum(), (logits, weight))
    actual = torch.autograd.grad(score(logits, weight, bias).sum(), (logits, weight))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("log_norm", [None, 0.7])
def test_margin_gradient_and_its_gradient(device, log_norm):
    logits, _, _ = head(device)
    target = torch.randint(6, (12,), device=device)
    target[3] = -100
    kept = target != -100
    norm = None if log_norm is None else torch.tensor(log_norm, dtype=torch.float64, device=device)
    inputs = (logits,) if norm is None else (logits, norm.requires_grad_())

    def margin(logits, log_norm=None):
        return marginops.classification_margin(logits, target, log_norm=log_norm)[kept]

    assert gradcheck(margin, inputs)
    assert gradgradcheck(margin, inputs)


@pytest.mark.parametrize("classes", [3, 64])
def test_gradient_in_low_precision_is_that_of_float64(device, dtype, classes):
    logits, weight, _ = (value.detach().to(dtype) for value in head(device, classes=classes))
    inputs = logits.requires_grad_(), weight.requires_grad_()
    exact = tuple(value.detach().double().requires_grad_() for value in inputs)
    for values in (inputs, exact):
        marginops.minimal_margin_score(*values).sum().backward()
    for value, wanted in zip(inputs, exact, strict=True):
        assert value.grad.dtype == dtype
        epsilon = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
        torch.testing.assert_close(
            value.grad.double(), wanted.grad, rtol=8 * epsilon, atol=8 * epsilon
        )


def test_ties_and_ignored_samples_in_gradients(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 0.0, 0.0], [5.0, 1.0, 1.0, 0.0]])
    logits = logits.to(device).requires_grad_()
    target = torch.tensor([0, 1, -100], device=device)
    marginops.classification_margin(logits, target).sum().backward()
    assert logits.grad.tolist() == [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 0, 0]]
    logits.grad = None
    weight = torch.eye(4, device=device)
    marginops.minimal_margin_score(logits, weight).sum().backward()
    side = 1 / math.sqrt(2)
    expected = [[0, side, -side, 0], [side, -side, 0, 0], [side, -side, 0, 0]]
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor(expected))


def test_gradient_is_zero_where_the_boundary_has_no_direction(device):
    logits = torch.tensor([[1.0, 0.5, 0.0]], device=device, requires_grad=True)
    weight = torch.ones(3, 2, device=device, requires_grad=True)
    score = marginops.minimal_margin_score(logits, weight)
    assert score.tolist() == [math.inf]
    score.backward()
    assert not logits.grad.any() and not weight.grad.any()


def test_weight_gradient_does_not_vary(device):
    logits, weight, bias = head(device, torch.float32, rows=4000, classes=7, columns=65)
    runs = set()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        score = marginops.minimal_margin_score(logits, weight, bias, bias_in_norm=True)
        gradients = torch.autograd.grad(score.square().sum(), (weight, bias))
        runs.add(tuple(value.cpu().numpy().tobytes() for value in gradients))
    assert len(runs) == 1


def test_second_derivative_of_the_score_is_an_error(device):
    logits, weight, _ = head(device)
    score = marginops.minimal_margin_score(logits, weight).sum()
    (gradient,) = torch.autograd.grad(score, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_opcheck(device):
    logits, weight, bias = head(device)
    target = torch.randint(6, (12,), device=device)
    target[0] = -1
    rows = torch.tensor([3, 3, 0], device=device)
    log_norm = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    key = torch.tensor([1, 1, 6, 35], device=device)
    coefficient = torch.randn(4, dtype=torch.float64, device=device)
    opcheck("classification_margin", logits, target, None, -1)
    opcheck("classification_margin", logits, target, log_norm, -1)
    opcheck("classification_margin_rival", logits.detach(), target, None, -1)
    opcheck("classification_margin_rival", logits.detach(), target, rows, -1)
    for nearest in (False, True):
        for norm_bias in (None, bias):
            opcheck("minimal_margin_score", logits, weight, norm_bias, nearest)
            for listed in (None, rows):
                detached = [a if a is None else a.detach() for a in (logits, weight, norm_bias)]
                opcheck("minimal_margin_pair_forward", *detached, listed, nearest)
    for norm_bias in (None, bias.detach()):
        opcheck("pair_gradient_forward", key, coefficient, weight.detach(), norm_bias)


@pytest.mark.parametrize("rival", ["top2", "nearest"])
def test_compile_full_graph_with_dynamic_rows(device, rival):
    def step(logits, weight, target):
        log_norm = weight.norm().log()
        score = marginops.minimal_margin_score(logits, weight, rival=rival)
        margin = marginops.classification_margin(logits, target, log_norm=log_norm)
        return score.sum() + margin.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 9, 23):
        logits, weight, _ = head(device, rows=rows)
        target = torch.randint(6, (rows,), device=device)
        actual = torch.autograd.grad(compiled(logits, weight, target), (logits, weight))
        expected = torch.autograd.grad(step(logits, weight, target), (logits, weight))
        torch.testing.assert_close(actual, expected)


def test_autocast_head(device):
    kind = torch.device(device).type
    layer = torch.nn.Linear(16, 10, device=device)
    features = torch.randn(64, 16, device=device)
    with torch.autocast(kind, dtype=torch.bfloat16):
        logits = layer(features)
        assert logits.dtype == torch.bfloat16
        score = marginops.minimal_margin_score(logits, layer.weight, layer.bias, bias_in_norm=True)
        score.sum().backward()
    assert score.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    expected = marginops.minimal_margin_score(
        logits.float(), layer.weight, layer.bias, bias_in_norm=True
    )
    torch.testing.assert_close(score, expected)


LOGITS, WEIGHT, TARGET = torch.randn(4, 3), torch.randn(3, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], TARGET), TypeError, r"logits: expected a tensor \[N, C\], got list"),
        ((torch.randn(3), TARGET), ValueError, r"logits: expected shape \[N, C\], got \[3\]"),
        ((torch.randn(4, 1), TARGET), ValueError, r"logits: expected at least 2 classes"),
        ((LOGITS.int(), TARGET), TypeError, "logits: expected dtype .*, got torch.int32"),
        ((LOGITS.to_sparse(), TARGET), TypeError, "logits: expected a dense .* torch.sparse_coo"),
        ((LOGITS, TARGET.int()), TypeError, "target: expected dtype torch.int64"),
        ((LOGITS, [0, 1, 2, 0]), TypeError, "target: expected a tensor"),
        ((LOGITS, TARGET[:3]), ValueError, r"target: expected shape \[4\].*got \[3\]"),
        ((LOGITS, TARGET.view(2, 2)), ValueError, "target: expected shape"),
        ((LOGITS, TARGET.to_sparse()), TypeError, "target: expected a dense .* torch.sparse_coo"),
        ((LOGITS, TARGET.to("meta")), ValueError, "target: expected device cpu .* got meta"),
    ],
)
@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_wrong_arguments_of_the_margin(arguments, error, message, which):
    with implementation(which), pytest.raises(error, match=message):
        marginops.classification_margin(*arguments)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize(("step", "wrong"), [(1, 3), (-1, -1)])
def test_wrong_target_values(which, step, wrong):
    message = rf"target: expected classes in \[0, 3\) or ignore_index -100, got {wrong}"
    with implementation(which), pytest.raises(RuntimeError, match=message):
        marginops.classification_margin(LOGITS, TARGET + step)


@pytest.mark.parametrize(
    ("log_norm", "error", "message"),
    [
        ("1", TypeError, "log_norm: expected a float or a 0-d tensor, got str"),
        (True, TypeError, "log_norm: expected a float or a 0-d tensor, got bool"),
        (torch.ones(2), ValueError, r"log_norm: expected shape \[\] \(0-d\), got \[2\]"),
        (torch.tensor(1), TypeError, "log_norm: expected dtype .* got torch.int64"),
        (torch.tensor(1.0, device="meta"), ValueError, "log_norm: expected device cpu"),
    ],
)
def test_wrong_log_norm(log_norm, error, message):
    with pytest.raises(error, match=message):
        marginops.classification_margin(LOGITS, TARGET, log_norm=log_norm)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS, "w"), {}, TypeError, r"weight: expected a tensor \[C, D\], got str"),
        ((LOGITS, WEIGHT[0]), {}, ValueError, r"weight: expected shape \[C, D\], got \[2\]"),
        ((LOGITS, WEIGHT.T), {}, ValueError, r"weight: expected 3 rows .* got shape \[2, 3\]"),
        ((LOGITS, WEIGHT.double()), {}, TypeError, "weight: expected dtype torch.float32 beside"),
        ((LOGITS.half(), WEIGHT.bfloat16()), {}, TypeError, "torch.float16 or torch.float32"),
        ((LOGITS, WEIGHT.to("meta")), {}, ValueError, "weight: expected device cpu"),
        ((LOGITS, WEIGHT, [1, 2, 3]), {}, TypeError, "bias: expected a tensor .* got list"),
        ((LOGITS, WEIGHT, torch.ones(3).to("meta")), {}, ValueError, "bias: expected device cpu"),
        ((LOGITS, WEIGHT, torch.ones(2)), {}, ValueError, r"bias: expected shape \[3\]"),
        ((LOGITS, WEIGHT, torch.ones(3).half()), {}, TypeError, "bias: expected dtype"),
        ((LOGITS, WEIGHT), {"bias_in_norm": True}, ValueError, "bias: expected a tensor"),
        ((LOGITS, WEIGHT), {"rival": "third"}, ValueError, 'rival: expected "top2" or "nearest"'),
    ],
)
def test_wrong_arguments_of_the_score(arguments, options, error, message):
    with pytest.raises(error, match=message):
        marginops.minimal_margin_score(*arguments, **options)


@pytest.mark.parametrize("ignore_index", [None, 1.5, True])
def test_wrong_ignore_index(ignore_index):
    with pytest.raises(TypeError, match="ignore_index: expected an int, got"):
        marginops.classification_margin(LOGITS, TARGET, ignore_index=ignore_index)


@pytest.mark.parametrize("op", ["classification_margin", "minimal_margin_score"])
def test_direct_calls_with_wrong_shapes_are_errors_too(op):
    wrong = (LOGITS, TARGET[:2], None, -100)
    if op == "minimal_margin_score":
        wrong = (LOGITS, WEIGHT[:2], None, False)
    with pytest.raises((RuntimeError, ValueError), match="expected"):
        getattr(OPS, op)(*wrong)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(device, which, dtype):
    with implementation(which):
        empty = torch.empty(0, 5, dtype=dtype, device=device)
        target = torch.empty(0, dtype=torch.int64, device=device)
        weight = torch.randn(5, 4, device=device).to(dtype)
        assert marginops.classification_margin(empty, target).shape == (0,)
        for rival in ("top2", "nearest"):
            assert marginops.minimal_margin_score(empty, weight, rival=rival).shape == (0,)


@given(case=score_cases(finite))
def test_gradient_touches_one_pair_of_classes(device, case):
    logits, weight, _ = (value if value is None else value.to(device) for value in case)
    logits = logits.detach().requires_grad_()
    marginops.minimal_margin_score(logits, weight).sum().backward()
    assert ((logits.grad != 0).sum(1) <= 2).all()
    assert not logits.grad.sum(1).any()


@pytest.mark.parametrize("classes", [2049, 2063, 4097, 4100])
@pytest.mark.parametrize("rival", ["top2", "nearest"])
def test_ties_across_the_pieces_of_long_rows(device, dtype, classes, rival):
    logits = torch.randint(-3, 4, (60, classes)).to(dtype)
    logits[:, 5:] -= 4  # few candidates, so that ties decide
    logits[::2, -1] = logits[::2].amax(1)
    logits[::3, 2047] = logits[::3].amax(1)
    weight = torch.randn(classes, 3).to(dtype)
    pair, _ = marginops.ops.margin._minimal_margin_pair(
        logits.to(device), weight.to(device), None, None, rival == "nearest"
    )
    expected, _ = brute_force.minimal_margin_pair(logits, weight, rival=rival)
    assert pair[:, 0].tolist() == [first for first, _ in expected]
    if rival == "top2":
        assert pair.tolist() == [list(classes) for classes in expected]


def test_half_precision_subnormals_where_the_processor_flushes_its_own():
    logits = torch.full((4, 64), 6e-8, dtype=torch.half)
    logits[1:, 3] = 1e-7
    flushes = torch.set_flush_denormal(True)
    try:
        pair, _ = marginops.ops.margin._minimal_margin_pair(
            logits, torch.eye(64).half(), None, None, False
        )
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    assert pair.tolist() == [[0, 1], [3, 0], [3, 0], [3, 0]]


def test_nearest_boundary_in_many_dimensions(device):
    weight = torch.full((3, 1_000_000), 0.074)
    weight[:, 0] = 1
    weight[1] *= -1
    weight[2] = 0
    logits = torch.tensor([[0.0, -2.0, -0.998]])
    score = marginops.minimal_margin_score(
        logits.to(device), weight.to(device), rival="nearest"
    ).cpu()
    _, expected = brute_force.minimal_margin_pair(logits, weight, rival="nearest")
    # A float32 sum of a million squares is good to 1e-4; the next class is 3e-3 farther.
    np.testing.assert_allclose(score.numpy(), expected, rtol=5e-4)


def test_forward_mode_is_an_error_and_not_zero(device):
    logits, weight, _ = (value.detach() for value in head(device))
    with pytest.raises(NotImplementedError, match="minimal_margin_score: no forward-mode"):
        torch.func.jvp(
            lambda logits: marginops.minimal_margin_score(logits, weight), (logits,), (logits,)
        )


def test_second_derivative_in_logits(device):
    logits, weight, _ = head(device)
    weight = weight.detach()
    assert gradgradcheck(lambda logits: marginops.minimal_margin_score(logits, weight), (logits,))


def test_vectorized_jacobian(device):
    logits, weight, _ = (value.detach() for value in head(device))
    target = torch.randint(6, (12,), device=device)
    for function in (
        lambda logits: marginops.classification_margin(logits, target),
        lambda logits: marginops.minimal_margin_score(logits, weight),
    ):
        batched = torch.autograd.functional.jacobian(function, logits, vectorize=True)
        assert torch.equal(batched, torch.autograd.functional.jacobian(function, logits))


def test_results_may_be_changed_in_place(device):
    logits, weight, _ = head(device)
    target = torch.randint(6, (12,), device=device)
    weight = weight.detach()
    marginops.minimal_margin_score(logits, weight).clamp_(max=1).sum().backward()
    marginops.classification_margin(logits, target).mul_(2).sum().backward()
    marginops.select_minimal_margin(logits, weight, 3).scores.mul_(2).sum().backward()
    marginops.select_smallest_margin(logits, target, 3).scores.mul_(2).sum().backward()
    assert logits.grad.any()


def test_an_op_without_a_native_kernel_runs_its_reference():
    double = define("brand_new_op(Tensor x) -> Tensor", lambda x: 2 * x, torch.empty_like)
    assert double(torch.ones(2)).tolist() == [2, 2]


def test_direct_calls_of_the_pair_gradient_with_wrong_keys():
    weight, coefficient = torch.zeros(2, 2), torch.ones(3)
    for key in ([0, 10**12, 3], [-1, 0, 1], [0, 1, 4]):
        with pytest.raises(RuntimeError, match="key: expected sorted values"):
            OPS.pair_gradient_forward(torch.tensor(key), coefficient, weight, None)
    key = torch.tensor([0, 1, 3])
    for bias in (torch.zeros(1), torch.zeros(2).double(), torch.zeros(2, 1)):
        with pytest.raises(RuntimeError, match="bias: expected"):
            OPS.pair_gradient_forward(key, coefficient, weight, bias)
