"""classification_margin and minimal_margin_score: values, gradients, errors, compilation."""

import math
import os

import numpy as np
import pytest
import scipy.spatial
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_hinge_loss

import marginops
from helpers import brute_force
from helpers.ops import DTYPES, IMPLEMENTATIONS, OPS, OTHER_LIBRARY, head, implementation, opcheck
from helpers.strategies import LAYOUTS, margin_cases, relayout, score_cases
from marginops import _native
from marginops._checks import result_dtype
from marginops.ops import margin_pair
from marginops.ops._library import Op


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
def test_pair_matches_brute_force(device, which, case):
    logits, weight, bias = (value if value is None else value.to(device) for value in case)
    with implementation(which):
        pair, _ = margin_pair.minimal_margin_pair_op(logits, weight, bias, None, False)
    expected, _ = brute_force.minimal_margin_pair(*case)
    assert pair.tolist() == [list(classes) for classes in expected]


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=margin_cases(), data=st.data())
def test_margin_and_rival_of_listed_rows(device, which, case, data):
    logits, target, log_norm = case
    indices = st.integers(0, len(logits) - 1) if len(logits) else st.nothing()
    listed = data.draw(st.lists(indices, max_size=5 if len(logits) else 0))
    rows = torch.tensor(listed, dtype=torch.int64)
    there, norm = (logits.to(device), target.to(device)), None
    if log_norm is not None:
        norm = torch.tensor(log_norm, device=device, dtype=result_dtype(logits.dtype))
    with implementation(which):
        whole = marginops.classification_margin(*there, log_norm=log_norm)
        for chosen in (slice(None), rows):
            some = None if chosen is not rows else rows.to(device)
            margin, rival = margin_pair.classification_margin_rival_op(*there, norm, some, -100)
            expected = whole[chosen if some is None else some]
            torch.testing.assert_close(margin, expected, rtol=0, atol=0, equal_nan=True)
            assert rival.tolist() == brute_force.rivals(logits[chosen], target[chosen])


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


def test_margin_matches_hinge_loss_of_torchmetrics(device):
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


def test_score_matches_distances_of_scipy(device):
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
    opcheck("classification_margin_rival", logits.detach(), target, None, None, -1)
    opcheck("classification_margin_rival", logits.detach(), target, None, rows, -1)
    for nearest in (False, True):
        for norm_bias in (None, bias):
            opcheck("minimal_margin_score", logits, weight, norm_bias, nearest, False)
            for listed in (None, rows):
                detached = [a if a is None else a.detach() for a in (logits, weight, norm_bias)]
                opcheck("minimal_margin_pair", *detached, listed, nearest)
    for norm_bias in (None, bias.detach()):
        opcheck("pair_gradient", key, coefficient, weight.detach(), norm_bias)


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


LOGITS, WEIGHT, TARGET = torch.randn(4, 3), torch.randn(3, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], TARGET), TypeError, r"logits: expected a tensor \[..., N, C\], got list"),
        ((torch.randn(3), TARGET), ValueError, r"logits: expected shape \[..., N, C\], got \[3\]"),
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
        ((LOGITS, WEIGHT.double()), {}, TypeError, "weight: expected dtype torch.float32 for"),
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
        wrong = (LOGITS, WEIGHT[:2], None, False, False)
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


@pytest.mark.parametrize("classes", [2049, 2063, 4097, 4100])
@pytest.mark.parametrize("rival", ["top2", "nearest"])
def test_ties_across_the_pieces_of_long_rows(device, dtype, classes, rival):
    logits = torch.randint(-3, 4, (60, classes)).to(dtype)
    logits[:, 5:] -= 4  # few candidates, so that ties matter
    logits[::2, -1] = logits[::2].amax(1)
    logits[::3, 2047] = logits[::3].amax(1)
    weight = torch.randn(classes, 3).to(dtype)
    pair, _ = margin_pair.minimal_margin_pair_op(
        logits.to(device), weight.to(device), None, None, rival == "nearest"
    )
    expected, _ = brute_force.minimal_margin_pair(logits, weight, rival=rival)
    assert pair[:, 0].tolist() == [first for first, _ in expected]
    if rival == "top2":
        assert pair.tolist() == [list(classes) for classes in expected]


def test_half_precision_subnormals_while_the_processor_flushes_subnormals():
    logits = torch.full((4, 64), 6e-8, dtype=torch.half)
    logits[1:, 3] = 1e-7
    flushes = torch.set_flush_denormal(True)
    try:
        pair, _ = margin_pair.minimal_margin_pair_op(
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
    # A float32 sum of a million squares is accurate to 1e-4; the next class is 3e-3 farther.
    np.testing.assert_allclose(score.numpy(), expected, rtol=5e-4)


def test_an_op_without_a_native_kernel_runs_its_reference():
    class DoubleOp(Op):
        schema = "double(Tensor x) -> Tensor"

        @staticmethod
        def reference(x):
            return 2 * x

        fake = staticmethod(torch.empty_like)

    double = DoubleOp()
    assert double(torch.ones(2)).tolist() == [2, 2]
    result = double(torch.ones(2, requires_grad=True))
    with pytest.raises(NotImplementedError, match="the op double has no gradient"):
        result.sum().backward()
