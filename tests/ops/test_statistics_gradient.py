"""Gradients of sample_statistics: values, precision, what is refused, compilation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import marginops
from helpers.ops import OPS, head
from helpers.rounding import assert_same, assert_within, random_logits
from helpers.strategies import LAYOUTS, relayout, statistics_cases

DIFFERENTIABLE = ("margin", "loss", "confidence", "entropy")


def weighted_sum(result, weights):
    """One number, in which every sample has its own weight."""
    total = 0.0
    for name, weight in weights.items():
        total = total + (getattr(result, name) * weight).sum()
    return total


def gradient_of(logits, target, weights, **options):
    logits = logits.detach().requires_grad_()
    result = marginops.sample_statistics(logits, target, **options)
    return torch.autograd.grad(weighted_sum(result, weights), logits)[0]


def random_weights(rows, device, dtype, names=DIFFERENTIABLE):
    return {name: torch.randn(rows, device=device, dtype=dtype) for name in names}


@pytest.mark.parametrize("names", [*[(name,) for name in DIFFERENTIABLE], DIFFERENTIABLE])
@pytest.mark.parametrize(("rows", "classes"), [(5, 2), (5, 6), (2, 50)])
def test_gradient_matches_finite_differences(device, names, rows, classes):
    logits, _, _ = head(device, rows=rows, classes=classes)
    target = torch.randint(classes, (rows,), device=device)
    target[1] = -100
    kept = target != -100
    inputs = (logits,)
    if "margin" in names:
        inputs += (torch.tensor(0.7, dtype=torch.float64, device=device).requires_grad_(),)

    def fields(logits, log_norm=None):
        result = marginops.sample_statistics(logits, target, log_norm=log_norm)
        return tuple(getattr(result, name)[kept] for name in names)

    assert gradcheck(fields, inputs)


@pytest.mark.parametrize("scale", [1, 30, 1e4])
@pytest.mark.parametrize("classes", [10, 60, 5000])
def test_gradient_of_the_loss_matches_torch(device, dtype, scale, classes):
    rows = 40 if classes == 5000 else 200
    logits, target = random_logits(device, dtype, rows, classes, scale)
    logits[:9, 3] = -math.inf
    logits[9:15, 5:] = -math.inf
    logits[6:9] += 1e4
    target[::7] = -100
    target[3] = 3  # infinite loss
    weights = random_weights(rows, device, torch.promote_types(dtype, torch.float32), ["loss"])
    actual = gradient_of(logits, target, weights)
    assert actual.dtype == dtype and actual.is_contiguous()
    wide = logits.to(weights["loss"].dtype).requires_grad_()
    loss = F.cross_entropy(wide, target, reduction="none")
    (expected,) = torch.autograd.grad((loss * weights["loss"]).sum(), wide)
    assert not actual[::7].any()
    assert_gradient(actual, expected, wide, target)


def assert_gradient(actual, expected, logits, target):
    """Compare up to a few roundings of each entry and of the terms that it sums.

    A term is at most log p_c times p_c, or times 1 for the label. The relative error of
    p_c = exp(log p_c) is the absolute error of log p_c.
    """
    wide, epsilon = torch.finfo(logits.dtype), torch.finfo(actual.dtype)
    log_p = logits.detach().log_softmax(1)
    reach = log_p.abs().clamp(max=-math.log(wide.tiny))
    slope = log_p.exp().scatter(1, target.clamp(min=0).unsqueeze(1), 1)
    relative = epsilon.eps + wide.eps * (4 + reach)
    absolute = 8 * wide.eps * slope * (4 + reach) + 4 * wide.tiny
    absolute += epsilon.smallest_normal * epsilon.eps
    bounds = [bound.double().cpu().numpy() for bound in (relative, absolute)]
    assert_within(actual, expected.cpu(), *bounds)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [2, 17, 48, 49, 2049, 5000])
def test_gradient_in_every_layout_and_dtype_matches_float64(device, dtype, layout, classes):
    logits, target = random_logits("cpu", dtype, 9, classes)
    target[4] = -100
    weights = random_weights(9, device, torch.float64)
    there = relayout(logits, layout).to(device), target.to(device)
    actual = gradient_of(*there, weights, log_norm=0.5)
    assert actual.dtype == dtype and actual.is_contiguous()
    wide = logits.double().to(device).requires_grad_()
    # As PyTorch computes it, except for the rival.
    log_p = wide.log_softmax(1)
    label = there[1].clamp(min=0).unsqueeze(1)
    rival = marginops.sample_statistics(wide, there[1]).rival.unsqueeze(1)
    fields = {
        "margin": (wide.gather(1, label) - wide.gather(1, rival)).squeeze(1) * math.exp(-0.5),
        "loss": -log_p.gather(1, label).squeeze(1),
        "confidence": log_p.exp().gather(1, label).squeeze(1),
        "entropy": -(log_p.exp() * log_p).sum(1),
    }
    total = sum((fields[name] * weight)[there[1] >= 0].sum() for name, weight in weights.items())
    (expected,) = torch.autograd.grad(total, wide)
    assert not actual[4].any()
    wide = wide.to(torch.promote_types(dtype, torch.float32))
    assert_gradient(actual, expected, wide, there[1])


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_nothing_cancels_as_the_confidence_approaches_one(device, wide):
    d = torch.arange(0, 86, dtype=torch.float64)
    logits = torch.stack((d, torch.zeros(86).double()), 1).to(device, wide)
    target = torch.zeros(86, dtype=torch.int64, device=device)
    q = torch.exp(-d) / (1 + torch.exp(-d))  # probability of the other class
    slopes = {"loss": -q, "confidence": q * (1 - q), "entropy": -d * q * (1 - q)}
    for name, slope in slopes.items():
        actual = gradient_of(logits, target, {name: torch.ones(86, device=device, dtype=wide)})
        expected = torch.stack((slope, -slope), 1)
        # log_sum and the entropy are of the order of 1 where d is small.
        absolute = torch.finfo(wide).eps * (d < 3).numpy()[:, None]
        relative = torch.finfo(wide).eps * (8 + d.numpy()[:, None] / 2)
        assert_within(actual, expected, relative, absolute, name)


@given(case=statistics_cases())
def test_gradient_of_the_margin_alone_matches_classification_margin(device, case):
    logits, target, _, log_norm = case
    logits, target = logits.to(device).requires_grad_(), target.to(device)
    norm = None if log_norm is None else torch.tensor(log_norm, device=device).requires_grad_()
    inputs = (logits,) if norm is None else (logits, norm)
    margin = marginops.classification_margin(logits, target, log_norm=norm)
    grad = torch.randn_like(margin)
    expected = torch.autograd.grad(margin, inputs, grad)
    margin = marginops.sample_statistics(logits, target, log_norm=norm).margin
    for actual, wanted in zip(torch.autograd.grad(margin, inputs, grad), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("names", [("margin",), ("loss",), ("confidence", "margin"), ("entropy",)])
def test_rows_without_a_finite_maximum_only_have_a_gradient_of_the_margin(device, dtype, names):
    logits, target = random_logits(device, dtype, rows=8, classes=5)
    logits[0, 2], logits[1, 3], logits[2] = math.nan, math.inf, -math.inf
    logits[3, target[3]] = -math.inf
    target[4] = -100
    logits[4] = math.nan
    weights = random_weights(8, device, torch.promote_types(dtype, torch.float32), names)
    gradient = gradient_of(logits, target, weights)
    if names == ("margin",):
        assert ((gradient != 0).sum(1) == torch.tensor([2, 2, 2, 2, 0, 2, 2, 2]).to(device)).all()
        return
    assert gradient[:3].isnan().all()
    assert not gradient[3:].isnan().any() and not gradient[4].any()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_without_strides_and_fields_without_gradients(device, dtype, name):
    logits, target = random_logits(device, dtype)
    logits.requires_grad_()
    result = marginops.sample_statistics(logits, target, input=torch.ones(200, 2, device=device))
    named = result._asdict()
    assert [key for key in named if named[key].requires_grad] == list(DIFFERENTIABLE)
    (stride_0,) = torch.autograd.grad(named[name].sum(), logits, retain_graph=True)
    ones, zeros = torch.ones_like(named[name]), torch.zeros_like(named[name])
    spread = torch.stack((ones, zeros), 1)[:, 0]
    (stride_2,) = torch.autograd.grad(named[name], logits, spread, retain_graph=True)
    assert torch.equal(stride_0, stride_2)
    fields = [named[key] for key in DIFFERENTIABLE]
    given = [ones if key == name else zeros for key in DIFFERENTIABLE]
    (together,) = torch.autograd.grad(fields, logits, given)
    assert torch.equal(stride_0, together)


def test_only_log_norm_needs_a_gradient(device):
    logits, target = random_logits(device, torch.float32)
    log_norm = torch.tensor(0.3, device=device, requires_grad=True)
    margin = marginops.sample_statistics(logits, target, log_norm=log_norm).margin
    (gradient,) = torch.autograd.grad(margin.sum(), log_norm)
    torch.testing.assert_close(gradient, -margin.sum().detach())
    loss = marginops.sample_statistics(logits.requires_grad_(), target, log_norm=log_norm).loss
    assert torch.autograd.grad(loss.sum(), log_norm, allow_unused=True) == (None,)


def test_second_derivative_and_forward_mode_are_errors(device):
    logits, target = random_logits(device, torch.float32)
    logits.requires_grad_()
    for name in DIFFERENTIABLE:
        field = getattr(marginops.sample_statistics(logits, target), name)
        (gradient,) = torch.autograd.grad(field.sum(), logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            gradient.sum().backward()
    tangents = (logits.detach(),), (logits.detach(),)
    with pytest.raises(NotImplementedError, match="sample_statistics: no forward-mode"):
        torch.func.jvp(lambda logits: marginops.sample_statistics(logits, target).loss, *tangents)


def test_vectorized_jacobian(device):
    logits, target = random_logits(device, torch.float64, rows=5)
    for name in DIFFERENTIABLE:

        def field(logits, name=name):
            return getattr(marginops.sample_statistics(logits, target), name)

        batched = torch.autograd.functional.jacobian(field, logits, vectorize=True)
        assert torch.equal(batched, torch.autograd.functional.jacobian(field, logits))


def test_results_changed_in_place(device):
    logits, target = random_logits(device, torch.float32)
    logits.requires_grad_()
    result = marginops.sample_statistics(logits, target)
    (result.loss.mul_(2).sum() + result.margin.mul_(2).sum()).backward()
    expected = gradient_of(logits, target, {"loss": 2.0, "margin": 2.0})
    assert torch.equal(logits.grad, expected)
    confidence = marginops.sample_statistics(logits, target).confidence.mul_(2)  # backward needs it
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        confidence.sum().backward()


def test_autocast(device):
    layer = torch.nn.Linear(16, 10, device=device)
    features, target = torch.randn(64, 16, device=device), torch.arange(64, device=device) % 10
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        logits = layer(features)
        result = marginops.sample_statistics(logits, target, input=features)
        loss = result.loss.mean()
        loss.backward()
    assert logits.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    wide = marginops.sample_statistics(logits.float(), target, input=features)
    for actual, expected in zip(result, wide, strict=True):
        torch.testing.assert_close(actual, expected)


def test_compile_full_graph_with_dynamic_rows(device):
    def step(logits, features, target):
        result = marginops.sample_statistics(
            logits, target, input=features, log_norm=logits.norm().log()
        )
        kept = result.loss * (result.gradient_norm > 1) + result.correct
        return (kept + result.margin - result.confidence * result.entropy).sum(), result.rival

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (5, 9, 23):  # not 6, the number of classes
        logits, _, _ = head(device, rows=rows)
        features = torch.randn(rows, 4, device=device)
        target = torch.randint(6, (rows,), device=device)
        actual, rival = compiled(logits, features, target)
        expected, wanted = step(logits, features, target)
        assert torch.equal(rival, wanted)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, logits), torch.autograd.grad(expected, logits)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("classes", [5, 300])
def test_direct_calls_give_all_or_part_of_the_gradient(device, dtype, classes):
    """None and zeros give the same gradient, for any layout of the rows."""
    logits, target = random_logits(device, dtype, rows=30, classes=classes)
    fields = OPS.sample_statistics(logits, target, None, None, -100, False)
    saved = [fields[i] for i in (1, 4, 5, 10, 11)]
    spread = [torch.stack((value, value), 1)[:, 1] for value in saved]
    grads = [torch.randn_like(fields[0]) for _ in range(4)]
    whole = OPS.sample_statistics_gradient(
        logits, target, *spread, None, *grads, None, None, -100
    ).double()
    parts = torch.zeros_like(whole)
    for i, grad in enumerate(grads):
        alone = [grad if i == j else None for j in range(4)]
        parts += OPS.sample_statistics_gradient(
            logits, target, *saved, None, *alone, None, None, -100
        )
    epsilon = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(whole, parts, rtol=epsilon, atol=epsilon)
    none = OPS.sample_statistics_gradient(logits, target, *saved, None, *[None] * 6, -100)
    assert torch.equal(none, torch.zeros_like(logits))
