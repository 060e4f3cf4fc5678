"""Gradients of the linear head equal those of the ops on its logits."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

import marginops
from helpers.linear_calls import (
    LABELLED,
    VARIANTS,
    Head,
    chunk_of,
    differentiable,
    exact_head,
    gradients,
    linear,
    plain,
    random_head,
)
from helpers.ops import OPS
from helpers.rounding import assert_same
from helpers.strategies import small_integers
from marginops._checks import result_dtype
from marginops.ops import linear_head, linear_statistics_gradient
from marginops.ops.row_sums import IGNORED

NAMES = list(VARIANTS)


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(device, variant, bias):
    head = random_head(device, rows=10, classes=5, columns=3)
    head = differentiable(head if bias else head._replace(bias=None))
    inputs = head.differentiable()
    if variant in LABELLED:
        inputs.append(torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True))

    def fields(*values):
        options = {"log_norm": values[-1]} if variant in LABELLED else {}
        moved = Head(*values[:2], values[2] if bias else None, head.target)
        results = linear(variant, moved, chunk_of(3, head), **options)
        # Ignored samples have infinite margins, and their finite differences would be NaN.
        return tuple(
            torch.where(field.isinf(), 0, field) for field in results if field.requires_grad
        )

    assert gradcheck(fields, inputs)


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_gradient_matches_the_composition(device, variant, rows, bias):
    """Sums of small integers are exact, so only divisions and exponentials may round."""
    head = differentiable(exact_head(device, torch.float64, bias=bias))
    options, inputs = {"chunk_bytes": chunk_of(rows, head)}, head.differentiable()
    norm = {}
    if variant in LABELLED:
        norm["log_norm"] = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
        inputs.append(norm["log_norm"])
    actual = gradients(linear, variant, head, inputs, **options, **norm)
    expected = gradients(plain, variant, head, inputs, **norm)
    if "margin" in variant:
        assert_same(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    if variant in ("margin", "normalized_margin", "statistics"):
        assert not actual[0][head.target == -100].any()


@pytest.mark.parametrize("index", range(4))
def test_gradient_of_each_statistic_alone(device, index):
    head = differentiable(random_head(device, rows=40))
    actual = gradients(linear, "statistics", head, index=index, chunk_bytes=chunk_of(7, head))
    torch.testing.assert_close(actual, gradients(plain, "statistics", head, index=index))


@pytest.mark.parametrize("variant", NAMES)
def test_gradient_for_some_of_the_arguments(device, variant):
    every = differentiable(exact_head(device, torch.float64))
    names = ("input", "weight", "bias")
    expected = dict(zip(names, gradients(linear, variant, every), strict=True))
    for needed in itertools.product((False, True), repeat=3):
        head = every.detach()
        chosen = [name for name, needs in zip(names, needed, strict=True) if needs]
        for name in chosen:
            getattr(head, name).requires_grad_()
        if not chosen:
            assert not any(field.requires_grad for field in linear(variant, head))
            continue
        actual = gradients(linear, variant, head, chunk_bytes=chunk_of(5, head))
        for name, value in zip(chosen, actual, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("variant", LABELLED)
def test_gradient_for_the_norm_alone(device, variant):
    head = exact_head(device, torch.float64)
    norm = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    actual = gradients(linear, variant, head, [norm], index=0, log_norm=norm)
    assert_same(actual, gradients(plain, variant, head, [norm], index=0, log_norm=norm))


@pytest.mark.parametrize("variant", ["select_margin", "select_score", "select_nearest"])
def test_only_chosen_samples_have_a_gradient(device, variant):
    head = differentiable(random_head(device, rows=50))
    head.target[:20], head.target[20:] = -100, 1
    scores, indices = linear(variant, head, k=40)
    (gradient,) = torch.autograd.grad(scores.sum(), head.input)
    expected = torch.zeros(50, dtype=torch.bool, device=device)
    expected[indices] = True
    if variant == "select_margin":
        assert expected[:20].sum() == 10  # no more ignored samples than needed
        expected[:20] = False
    assert gradient.any(1).tolist() == expected.tolist()


def test_ignored_and_unchosen_samples_add_no_gradient(device):
    head = differentiable(exact_head(device))
    head = head._replace(target=torch.full_like(head.target, -100))
    for variant in LABELLED:
        assert not any(value.any() for value in gradients(linear, variant, head))
    for variant in ("select_margin", "select_score"):
        assert not any(value.any() for value in gradients(linear, variant, head, k=0))


def test_no_gradient_where_the_boundary_has_no_direction(device):
    head = differentiable(exact_head(device))
    with torch.no_grad():
        head.weight.fill_(1)
    for variant in ("score", "nearest", "select_nearest"):
        _, *parameters = gradients(linear, variant, head._replace(bias=None), [*head[:2]])
        assert not any(value.any() for value in parameters)


@pytest.mark.parametrize("variant", NAMES)
@pytest.mark.parametrize("chunk_rows", [10, 1000])
def test_sums_over_samples_are_in_float32(device, dtype, variant, chunk_rows):
    """A running sum of 1000 such terms in half precision would be wrong by half."""
    input, weight = small_integers(1000, 8).abs(), small_integers(7, 8)
    target = torch.full((1000,), 2)
    # One class leads in all samples, so that terms do not cancel in any sum.
    bias = (0.0 if variant in LABELLED else 30.0) * (torch.arange(7) == 2)
    head = Head(input, weight, bias, target).to(device, dtype)
    exact, head = differentiable(head.to(torch.float64)), differentiable(head)

    def summed(head, size):
        fields = linear(variant, head, size, **({"k": 1000} if "select" in variant else {}))
        fields = fields if variant != "statistics" else fields[3:4]
        return torch.autograd.grad(fields[0].sum(), head[:3])

    # Each term and each sum of a chunk is rounded, and 1000 of them are added.
    tolerance = 4 * torch.finfo(dtype).eps + 1000 * torch.finfo(result_dtype(dtype)).eps
    for value, actual, expected in zip(
        head, summed(head, chunk_of(chunk_rows, head)), summed(exact, None), strict=False
    ):
        assert actual.dtype == value.dtype
        error = (actual.double() - expected).abs().max()
        assert error <= tolerance * expected.abs().max()


@pytest.mark.parametrize("variant", NAMES)
def test_every_run_gives_the_same_bits(device, variant):
    """The number of threads changes only gradients that a matrix product sums up."""
    head = differentiable(exact_head(device, rows=4000, columns=9))
    runs = set()
    for threads in (2, 2) if variant == "statistics" else (1, 2, 2):
        torch.set_num_threads(threads)
        results = gradients(linear, variant, head, chunk_bytes=chunk_of(900, head))
        runs.add(tuple(value.cpu().numpy().tobytes() for value in results))
    assert len(runs) == 1


@pytest.mark.parametrize("variant", NAMES)
def test_gradient_of_margins_needs_no_logits(device, variant, monkeypatch):
    head = differentiable(exact_head(device, torch.float64))
    expected = gradients(plain, variant, head, index=0)
    fields = linear(variant, head)

    def refuse(*_):
        raise AssertionError("logits in the backward pass")

    for module in (linear_head, linear_statistics_gradient):
        monkeypatch.setattr(module, "logit_tiles", refuse)
    weights = torch.arange(len(fields[0]), device=device) % 7 - 2.0
    actual = torch.autograd.grad(fields[0], head[:3], weights.double(), retain_graph=True)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    if variant == "statistics":
        with pytest.raises(AssertionError, match="logits in the backward pass"):
            fields[3].sum().backward()


def test_margins_beside_other_statistics_have_the_same_gradient(device):
    head = exact_head(device, torch.float64)
    norm = torch.tensor(0.5, dtype=torch.float64, device=device)
    grad = torch.arange(23.0, dtype=torch.float64, device=device) - 9
    fields = OPS.linear_sample_statistics(*head[:3], head.target, norm, -100, None, None)
    saved = fields[1], fields[4], fields[5], fields[10], fields[11]
    target = torch.where(head.target == -100, IGNORED, head.target)
    options = None, chunk_of(3, head), True, True
    actual = OPS.linear_sample_statistics_gradient(
        *head[:3], target, *saved, norm, grad, None, None, None, *options
    )
    differentiable(head)
    margin = marginops.linear_sample_statistics(*head[:2], head.target, head.bias, log_norm=0.5)[0]
    torch.testing.assert_close(actual, torch.autograd.grad(margin, head[:3], grad))


def second_derivative(variant, head, index, first, second):
    fields = [field for field in linear(variant, head) if field.requires_grad]
    value = fields[index][fields[index].isfinite()].square().sum()
    (gradient,) = torch.autograd.grad(value, getattr(head, first), create_graph=True)
    torch.autograd.grad(gradient.square().sum(), getattr(head, second))


@pytest.mark.parametrize(
    ("variant", "index"),
    [(name, 0) for name in ("score", "score_with_bias", "nearest", "select_score")]
    + [("statistics", index) for index in (1, 2, 3)],
)
def test_second_derivatives_are_errors(device, variant, index):
    head = differentiable(random_head(device, rows=20))
    for first, second in itertools.product(("input", "weight", "bias"), repeat=2):
        if variant != "statistics" and second != "weight":
            continue
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            second_derivative(variant, head, index, first, second)


@pytest.mark.parametrize("variant", ["margin", "select_margin"])
def test_second_derivatives_of_margins_are_right_or_errors(device, variant):
    head = differentiable(random_head(device, rows=20))
    for first, second in itertools.product(("input", "weight", "bias"), repeat=2):
        if first == "input":
            second_derivative(variant, head, 0, first, second)
            continue
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            second_derivative(variant, head, 0, first, second)


def test_forward_mode_is_an_error_and_not_zero(device):
    head = random_head(device)
    for variant in NAMES:
        with pytest.raises(NotImplementedError, match=r"linear_\w+: no forward-mode"):
            torch.func.jvp(
                lambda input, variant=variant: linear(variant, head._replace(input=input))[0],
                (head.input,),
                (head.input,),
            )
