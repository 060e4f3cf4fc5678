"""The linear head equals the ops on its logits, for every chunk size, dtype and layout."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import marginops
from helpers import brute_force
from helpers.linear_calls import (
    LABELLED,
    VARIANTS,
    Head,
    chunk_of,
    exact_head,
    linear,
    plain,
    random_head,
)
from helpers.ops import IMPLEMENTATIONS, OPS, implementation, opcheck
from helpers.rounding import assert_same, assert_within
from helpers.strategies import linear_cases
from marginops._checks import result_dtype
from marginops.ops.row_sums import IGNORED
from marginops.ops.tiles import logit_tiles, tile_shape

NAMES = list(VARIANTS)


def assert_alike(variant, result, expected):
    """Compare values exactly, except sums over classes, which are rounded piece by piece."""
    if variant == "statistics":
        for one, other in zip(result, expected, strict=True):
            rtol = 32 * torch.finfo(one.dtype).eps if one.is_floating_point() else 0
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-18, equal_nan=True)
        result, expected = ((*fields[:3], fields[6]) for fields in (result, expected))
    assert_same(result, expected)


@pytest.mark.parametrize("variant", NAMES)
@given(case=linear_cases(), which=st.sampled_from(IMPLEMENTATIONS), data=st.data())
def test_exact_logits_give_the_results_of_the_plain_op(device, variant, case, which, data):
    *tensors, rows = case
    head = Head(*tensors).to(device)
    options = {}
    if variant.startswith("select"):
        options["k"] = data.draw(st.integers(0, len(head.input)))
    with implementation(which):
        result = linear(variant, head, chunk_of(rows, head), **options)
        expected = plain(variant, head, **options)
    assert_alike(variant, result, expected)


@given(case=linear_cases())
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_exact_logits_match_brute_force(device, case):
    *tensors, rows = case
    head = Head(*tensors)
    logits = head.input.double() @ head.weight.double().T
    logits = logits if head.bias is None else logits + head.bias.double()
    epsilon = 4 * torch.finfo(result_dtype(head.input.dtype)).eps

    def check(variant, expected):
        actual = linear(variant, head.to(device), chunk_of(rows, head))[0]
        assert_within(actual, expected, epsilon, 0, variant)

    check("margin", brute_force.classification_margin(logits, head.target))
    for variant, rival in (("score_with_bias", "top2"), ("nearest", "nearest")):
        _, expected = brute_force.minimal_margin_pair(logits, *head[1:3], rival=rival)
        check(variant, expected)
    statistics = marginops.linear_sample_statistics(*head[:2], head.target, head.bias)
    expected = brute_force.sample_statistics(logits, head.target, head.input)
    for name in ("rival", "correct"):
        assert getattr(statistics, name).tolist() == expected[name].tolist()
    k = len(logits) // 2
    for variant, scored in (
        ("select_margin", "normalized_margin"),
        ("select_score", "score_with_bias"),
    ):
        scores, indices = linear(variant, head.to(device))
        every = linear(scored, head.to(device))[0]
        assert indices.tolist() == brute_force.select_smallest(every.tolist(), k)
        assert_same(scores, every[indices])


def rounding_of_logits(head):
    """The largest error that a row's logits may have, from the product and from storing them."""
    input, weight, bias, _ = head.to(torch.float64)
    sums = input.abs() @ weight.abs().T + bias.abs()
    epsilon = torch.finfo(result_dtype(head.input.dtype)).eps
    stored = torch.finfo(head.input.dtype).eps * F.linear(input, weight, bias).abs()
    return ((input.shape[1] + 2) * epsilon * sums + stored).amax(1)


@pytest.mark.parametrize("chunk_rows", [1, 70, 1000])
def test_random_logits_up_to_rounding(device, dtype, chunk_rows):
    head = random_head(device, dtype)
    wide = head.to(torch.float64)
    error = rounding_of_logits(head)
    relative = 8 * torch.finfo(result_dtype(dtype)).eps
    size = chunk_of(chunk_rows, head)

    def check(actual, expected, absolute, name=""):
        assert actual.dtype == result_dtype(dtype)
        assert_within(actual, expected.cpu(), relative, absolute.cpu().numpy(), name)

    check(linear("margin", head, size)[0], plain("margin", wide)[0], 2 * error)
    # The score jumps where the second class changes or where two boundaries are equally near.
    top = F.linear(*wide[:3]).topk(3).values
    clear = top[:, 1] - top[:, 2] > 2 * error
    assert clear.double().mean() > 0.8
    step = (wide.weight.unsqueeze(1) - wide.weight).norm(dim=2)
    closest = step[step > 0].min()
    score = linear("score", head, size)[0]
    check(score[clear], plain("score", wide)[0][clear], 2 * error[clear] / closest)
    nearest = linear("nearest", head, size)[0]
    check(nearest, plain("nearest", wide)[0], 2 * error / closest)

    # If logits move by d, |dp|_1 <= 2 d, and the entropy H moves by at most 2 H d.
    slopes = {"loss": 2, "confidence": 1, "entropy": 2 * math.log(10), "el2n": 2}
    slopes["gradient_norm"] = 2 * torch.hypot(torch.ones_like(error), wide.input.norm(dim=1))
    result = marginops.linear_sample_statistics(*head[:2], head.target, head.bias, chunk_bytes=size)
    expected = marginops.sample_statistics(F.linear(*wide[:3]), wide.target, input=wide.input)
    for name, slope in slopes.items():
        # The factor 1.1 covers what a finite step adds to the slope.
        check(getattr(result, name), getattr(expected, name), 1.1 * slope * error, name)


@pytest.mark.parametrize("variant", NAMES)
def test_results_do_not_depend_on_the_size_of_chunks(device, dtype, variant):
    head = exact_head(device, dtype, rows=13)
    expected = linear(variant, head)
    assert_same(expected, plain(variant, head))
    for rows in range(1, 15):
        assert_alike(variant, linear(variant, head, chunk_of(rows, head) + rows % 2), expected)


@pytest.mark.parametrize("whole_rows", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 10, 11])
def test_tiles_share_one_buffer_of_the_size_asked_for(device, dtype, rows, whole_rows):
    head = exact_head(device, dtype, rows=10)
    limit = chunk_of(rows, head) + 1
    expected = F.linear(*head[:3])
    seen, buffers = torch.zeros_like(expected, dtype=torch.int64), set()
    shape = tile_shape(*head[:2], None, limit, whole_rows)
    for part, classes, logits in logit_tiles(*head[:3], None, shape):
        assert logits.nbytes <= logits.untyped_storage().nbytes() <= limit
        assert torch.equal(logits, expected[part, classes])
        assert not whole_rows or logits.shape[1] == 7
        buffers.add(logits.data_ptr())
        seen[part, classes] += 1
    assert (seen == 1).all()
    assert len(buffers) == 1


def test_tiles_are_about_square_unless_many_whole_rows_fit():
    def shape(rows, classes, **options):
        features = torch.empty(rows, 4, device="meta")
        weight = torch.empty(classes, 4, device="meta")
        return tile_shape(features, weight, None, 16 << 20, **options)

    assert shape(8192, 1000) == (4096, 1000)
    assert shape(8192, 32000) == (2048, 2048)
    assert shape(8192, 32000, whole_rows=True) == (131, 32000)
    assert shape(50, 32000) == (50, 32000)
    assert shape(0, 32000) == (0, 32000)


@pytest.mark.parametrize("variant", NAMES)
def test_pieces_of_many_rows(device, variant):
    head = exact_head(device, rows=2500)
    whole = plain(variant, head)
    for rows in (1100, 1024, 900):  # whole rows and parts of rows
        assert_alike(variant, linear(variant, head, chunk_of(rows, head)), whole)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("columns", [0, 5])
def test_few_or_no_samples_and_features(device, dtype, which, variant, rows, columns):
    for bias in (False, True):
        head = exact_head(device, dtype, rows, 3, columns, bias)
        for k in range(rows + 1) if "select" in variant else [None]:
            options = {} if k is None else {"k": k}
            with implementation(which):
                result = linear(variant, head, **options)
                assert_same(result, plain(variant, head, **options))
            assert {len(field) for field in result} == {rows if k is None else k}


@pytest.mark.parametrize("variant", LABELLED)
def test_log_norm_and_another_ignored_target(device, dtype, variant):
    head = exact_head(device, dtype)
    head.target[head.target == -100] = 7
    number = linear(variant, head, log_norm=0.3, ignore_index=7)
    assert_same(number, plain(variant, head, log_norm=0.3, ignore_index=7))
    for kind in (torch.float32, torch.float64, torch.bfloat16):
        log_norm = torch.tensor(0.3, dtype=kind, device=device)
        result = linear(variant, head, log_norm=log_norm, ignore_index=7)
        assert_same(result, plain(variant, head, log_norm=log_norm, ignore_index=7))
    if "select" not in variant:
        assert (number[0][::5] == math.inf).all()


@pytest.mark.parametrize("variant", ["select_margin", "select_score", "select_nearest"])
def test_selection_matches_the_scores(device, dtype, variant):
    """This holds for rounded logits too, since equal chunks round equally."""
    head = random_head(device, dtype)
    of = {"select_margin": "normalized_margin", "select_score": "score_with_bias"}
    options = {} if variant in of else {"bias_in_norm": False}
    scores = linear(of.get(variant, "nearest"), head, chunk_of(70, head), **options)[0]
    for k in (0, 1, 150, 300):
        chosen = linear(variant, head, chunk_of(70, head), k=k)
        assert_same(chosen, tuple(marginops.select_smallest(scores, k)))


def test_numpy_integers_count_samples(device):
    head = exact_head(device)
    assert_same(linear("select_score", head, k=np.int64(4)), linear("select_score", head, k=4))


@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(device, with_bias):
    """The op as autocast calls it too: without a bias, and with a product in another dtype."""
    head = random_head(device, torch.float64 if with_bias else torch.float32, rows=8, columns=3)
    layer = [value.requires_grad_() for value in head[:3]] if with_bias else [*head[:2], None]
    dtype = None if with_bias else torch.bfloat16
    norm = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    norm = norm if with_bias else None
    target, end = head.target, (dtype, chunk_of(3, head))
    for k in (None, 4):
        opcheck("linear_classification_margin", *layer, target, norm, k, -100, *end)
        opcheck("linear_minimal_margin_score", *layer, k, with_bias, with_bias == (k is None), *end)
    opcheck("linear_sample_statistics", *layer, target, norm, -100, *end)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_gradient(device, needed):
    head = random_head(device, rows=8, columns=3)
    norm = torch.tensor(0.5, dtype=torch.float64, device=device)
    end = None, chunk_of(3, head)
    fields = OPS.linear_sample_statistics(*head[:3], head.target, norm, -100, *end)
    saved = fields[1], fields[4], fields[5], fields[10], fields[11], norm
    grads = [torch.randn_like(fields[0]) if i < 2 or all(needed) else None for i in range(4)]
    target = torch.where(head.target == -100, IGNORED, head.target)
    arguments = *head[:3], target, *saved, *grads, *end, *needed
    opcheck("linear_sample_statistics_gradient", *arguments)


def results_and_loss(input, weight, bias, target):
    """The results of every function, and a loss that is made of all of them."""
    head, log_norm = Head(input, weight, bias, target), weight.norm().log()
    results, loss = {}, 0
    for variant in NAMES:
        options = {"log_norm": log_norm} if variant in LABELLED else {}
        results[variant] = linear(variant, head, chunk_of(4, head), **options)
        values = results[variant][0]
        loss = loss + torch.where(values.isinf(), 0, values).sum()
    return results, loss + results["statistics"][3].sum() + results["statistics"][5].sum()


def just_the_margin(input, weight, bias, target):
    margin = marginops.linear_classification_margin(input, weight, target, bias)
    return {"margin": (margin,)}, margin.clamp(max=1).sum()


@pytest.mark.parametrize(
    ("step", "backend"), [(results_and_loss, "aot_eager"), (just_the_margin, "inductor")]
)
def test_compile_full_graph_with_dynamic_rows(device, step, backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (9, 14, 40):
        head = exact_head(device, torch.float64, rows=rows, columns=5)
        for value in head[:3]:
            value.requires_grad_()
        (actual, loss), (expected, wanted) = compiled(*head), step(*head)
        assert actual.keys() == expected.keys()
        for variant, fields in actual.items():
            torch.testing.assert_close(fields, expected[variant])
        torch.testing.assert_close(
            torch.autograd.grad(loss, head[:3]), torch.autograd.grad(wanted, head[:3])
        )
    assert counter.frame_count == 1
