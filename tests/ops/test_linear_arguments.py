"""The linear head: dtypes with and without autocast, and wrong arguments."""

import itertools

import pytest
import torch

import marginops
from helpers.linear_calls import (
    LABELLED,
    VARIANTS,
    Head,
    differentiable,
    exact_head,
    gradients,
    linear,
    plain,
)
from helpers.ops import DTYPES, IMPLEMENTATIONS, implementation
from helpers.rounding import assert_same

NAMES = list(VARIANTS)
HALVES = [torch.bfloat16, torch.float16]


def autocast(device, dtype=torch.bfloat16):
    return torch.autocast(torch.device(device).type, dtype=dtype)


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("product", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_matches_the_composition(device, variant, product, bias):
    head = differentiable(exact_head(device, bias=bias))
    with torch.no_grad():
        head.input[:, 0] = 257  # rounded to 256 in bfloat16
        head.weight[:, 0] = torch.arange(7, device=device) == 3
    row = 7 * 2
    with autocast(device, product):
        result, expected = linear(variant, head, 4 * row), plain(variant, head)
        actual = gradients(linear, variant, head, chunk_bytes=4 * row)
        wanted = gradients(plain, variant, head)
    assert_same(tuple(map(torch.detach, result)), tuple(map(torch.detach, expected)))
    without = linear(variant, head)
    assert without[0].dtype == result[0].dtype == torch.float32
    if product == torch.bfloat16:
        assert not torch.equal(without[0], result[0])
    for value, one, other in zip(head.differentiable(), actual, wanted, strict=True):
        assert one.dtype == value.dtype
        # The composition rounds the gradient of the logits, and each of its products.
        scale = other.abs().amax() * torch.finfo(product).eps
        torch.testing.assert_close(one, other, rtol=0, atol=4 * float(scale))


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("product", HALVES)
def test_autocast_of_any_mixture_of_dtypes(device, variant, product):
    every = exact_head(device)
    expected = linear(variant, every)
    wanted = gradients(linear, variant, differentiable(every))
    single, (one, other) = torch.float32, HALVES
    mixtures = [*itertools.permutations((single, one, other)), (one, single, single)]
    for dtypes in [*mixtures, (single, other, other), (one, one, one), (other, other, other)]:
        mixed = (value.to(dtype) for value, dtype in zip(every.detach(), dtypes, strict=False))
        head = differentiable(Head(*mixed, every.target))
        with autocast(device, product):
            assert_same(tuple(map(torch.detach, linear(variant, head))), expected)
            actual = gradients(linear, variant, head, chunk_bytes=28)
        for value, result, expected_one in zip(head, actual, wanted, strict=False):
            assert result.dtype == value.dtype
            scale = float(expected_one.abs().amax()) * torch.finfo(torch.bfloat16).eps
            torch.testing.assert_close(result.float(), expected_one, rtol=0, atol=4 * scale)


@pytest.mark.parametrize("variant", NAMES)
def test_autocast_leaves_float64_alone(device, variant):
    head = differentiable(exact_head(device, torch.float64))
    with torch.no_grad():
        head.input.add_(2.0**-30)
    expected, wanted = linear(variant, head), gradients(linear, variant, head)
    with autocast(device):
        result, actual = linear(variant, head), gradients(linear, variant, head)
    assert result[0].dtype == torch.float64
    assert_same(tuple(map(torch.detach, result)), tuple(map(torch.detach, expected)))
    assert_same(actual, wanted)


@pytest.mark.parametrize("variant", NAMES)
def test_shapes_on_the_meta_device(variant):
    """The meta device has no autocast state to ask for."""
    head = Head(INPUT, WEIGHT, BIAS, TARGET)
    with autocast("cpu"):
        results = linear(variant, head.to("meta"))
    for result, expected in zip(results, linear(variant, head), strict=True):
        assert result.is_meta
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("variant", NAMES)
def test_mixed_dtypes_are_refused(variant):
    for one, other in itertools.permutations(DTYPES, 2):
        head = exact_head("cpu", one)
        wrong = {
            "weight": head._replace(weight=head.weight.to(other)),
            "bias": head._replace(bias=head.bias.to(other)),
        }
        for name, mixed in wrong.items():
            message = f"{name}: expected dtype {one} as input, got {other}"
            with pytest.raises(TypeError, match=message):
                linear(variant, mixed)
            if torch.float64 in (one, other):
                with autocast("cpu"), pytest.raises(TypeError, match=message):
                    linear(variant, mixed)


INPUT, WEIGHT, BIAS = torch.randn(4, 2), torch.randn(3, 2), torch.randn(3)
TARGET = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (([1.0], WEIGHT), TypeError, r"input: .* a tensor \[(..., )?N, D\], got list"),
        ((INPUT[0], WEIGHT), ValueError, r"input: expected shape \[(..., )?N, D\], got \[2\]"),
        ((INPUT.int(), WEIGHT), TypeError, "input: expected dtype .*, got torch.int32"),
        ((INPUT.to_sparse(), WEIGHT), TypeError, "input: expected a dense .* torch.sparse_coo"),
        ((INPUT, "w"), TypeError, r"weight: expected a tensor \[C, D\], got str"),
        ((INPUT, WEIGHT[0]), ValueError, r"weight: expected shape \[C, D\], got \[2\]"),
        ((INPUT, WEIGHT.T), ValueError, r"weight: expected 2 columns for input \[4, 2\], got .*3"),
        ((INPUT, WEIGHT[:1]), ValueError, r"weight: expected at least 2 classes .*, got \[1, 2\]"),
        ((INPUT, WEIGHT[:0]), ValueError, r"weight: expected at least 2 classes .*, got \[0, 2\]"),
        ((INPUT, WEIGHT.bool()), TypeError, "weight: expected dtype .*, got torch.bool"),
        ((INPUT, WEIGHT.to("meta")), ValueError, "weight: expected device cpu as input, got meta"),
        ((INPUT, WEIGHT, 1.0), TypeError, r"bias: expected a tensor \[C\], got float"),
        ((INPUT, WEIGHT, WEIGHT), ValueError, r"bias: expected shape \[C\], got \[3, 2\]"),
        ((INPUT, WEIGHT, BIAS[:2]), ValueError, r"bias: expected shape \[3\] for weight .*\[2\]"),
        ((INPUT, WEIGHT, BIAS.long()), TypeError, "bias: expected dtype .*, got torch.int64"),
        ((INPUT, WEIGHT, BIAS.to("meta")), ValueError, "bias: expected device cpu as weight"),
    ],
)
@pytest.mark.parametrize("variant", ["margin", "score", "statistics", "select_margin", "nearest"])
def test_wrong_layers(variant, layer, error, message):
    head = Head(*layer, *[None] * (3 - len(layer)), TARGET)
    with pytest.raises(error, match=message):
        linear(variant, head, k=1) if "select" in variant else linear(variant, head)


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (11, ValueError, "chunk_bytes: expected at least 12, one row of 3 logits, got 11"),
        (0, ValueError, "chunk_bytes: expected at least 12, one row of 3 logits, got 0"),
        (-12, ValueError, "chunk_bytes: expected at least 12, one row of 3 logits, got -12"),
        (12.0, TypeError, "chunk_bytes: expected an int or None, got float"),
        ("12", TypeError, "chunk_bytes: expected an int or None, got str"),
        (True, TypeError, "chunk_bytes: expected an int or None, got bool"),
    ],
)
@pytest.mark.parametrize("variant", NAMES)
def test_wrong_chunk_bytes(variant, size, error, message):
    with pytest.raises(error, match=message):
        linear(variant, Head(INPUT, WEIGHT, BIAS, TARGET), size)


def test_least_chunk_bytes_under_autocast():
    with autocast("cpu"):
        marginops.linear_classification_margin(INPUT, WEIGHT, TARGET, chunk_bytes=6)
        with pytest.raises(ValueError, match=r"chunk_bytes: expected at least 6, .* got 5"):
            marginops.linear_classification_margin(INPUT, WEIGHT, TARGET, chunk_bytes=5)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (TARGET.int(), TypeError, "target: expected dtype torch.int64 .*, got torch.int32"),
        ([0, 1, 2, 0], TypeError, r"target: expected a tensor \[N\], got list"),
        (TARGET[:3], ValueError, r"target: expected shape \[4\] for input \[4, 2\], got \[3\]"),
        (TARGET.view(2, 2), ValueError, r"target: expected shape \[4\] .*, got \[2, 2\]"),
        (TARGET.to_sparse(), TypeError, "target: expected a dense .* torch.sparse_coo"),
        (TARGET.to("meta"), ValueError, "target: expected device cpu as input, got meta"),
    ],
)
@pytest.mark.parametrize("variant", LABELLED)
def test_wrong_targets(variant, target, error, message):
    with pytest.raises(error, match=message):
        linear(variant, Head(INPUT, WEIGHT, BIAS, target))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", LABELLED)
@pytest.mark.parametrize("wrong", [3, -1])
def test_wrong_target_values_in_any_chunk(which, variant, wrong):
    message = rf"target: expected classes in \[0, 3\) or ignore_index -100, got {wrong}"
    for row in (0, 3):
        target = TARGET.clone()
        target[row] = wrong
        with implementation(which), pytest.raises(RuntimeError, match=message):
            linear(variant, Head(INPUT, WEIGHT, BIAS, target), 12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"log_norm": "1"}, TypeError, "log_norm: expected a float or a 0-d tensor, got str"),
        ({"log_norm": True}, TypeError, "log_norm: expected a float or a 0-d tensor, got bool"),
        ({"log_norm": BIAS}, ValueError, r"log_norm: expected shape \[\] \(0-d\), got \[3\]"),
        ({"log_norm": torch.tensor(1)}, TypeError, "log_norm: expected dtype .* torch.int64"),
        ({"log_norm": BIAS[0].to("meta")}, ValueError, "log_norm: expected device cpu .* meta"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index: expected an int, got float"),
        ({"ignore_index": True}, TypeError, "ignore_index: expected an int, got bool"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an int, got NoneType"),
    ],
)
@pytest.mark.parametrize("variant", LABELLED)
def test_wrong_options_of_margins(variant, options, error, message):
    with pytest.raises(error, match=message):
        linear(variant, Head(INPUT, WEIGHT, BIAS, TARGET), **options)


@pytest.mark.parametrize("name", ["minimal_margin_score", "select_minimal_margin"])
def test_wrong_options_of_scores(name):
    function = getattr(marginops, f"linear_{name}")
    options = {"k": 1} if name.startswith("select") else {}
    with pytest.raises(ValueError, match=r"bias: expected a tensor \[C\] because bias_in_norm"):
        function(INPUT, WEIGHT, **options, bias_in_norm=True)
    with pytest.raises(ValueError, match='rival: expected "top2" or "nearest", got \'third\''):
        function(INPUT, WEIGHT, **options, rival="third")


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, r"k: expected 0 <= k <= 4 \(the number of rows of input\), got -1"),
        (5, ValueError, r"k: expected 0 <= k <= 4 \(the number of rows of input\), got 5"),
        (1.5, TypeError, "k: expected an int, got float"),
        (None, TypeError, "k: expected an int, got NoneType"),
        (True, TypeError, "k: expected an int, got bool"),
    ],
)
@pytest.mark.parametrize("variant", ["select_margin", "select_score"])
def test_wrong_k(variant, k, error, message):
    with pytest.raises(error, match=message):
        linear(variant, Head(INPUT, WEIGHT, BIAS, TARGET), k=k)
