"""Gradients of class_moments: values, samples that have none, second derivatives, compilation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from helpers.ops import OPS, opcheck
from helpers.strategies import LAYOUTS, relayout
from marginops.ops.moments import class_moments


def samples(device, rows=12, columns=5, classes=3):
    input = torch.randn(rows, columns, dtype=torch.float64, device=device)
    return input.requires_grad_(), torch.arange(rows, device=device) % classes


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("columns", [1, 5])
def test_derivatives_match_finite_differences(device, normalize, columns):
    input, target = samples(device, columns=columns)
    target[1] = -100
    if normalize:
        input = (input.detach() + 1.5).requires_grad_()  # away from 0 in one column

    def fields(input):
        _, mean, radius = class_moments(input, target, 4, normalize=normalize)
        return mean[:3], radius[:3] if columns > 1 or not normalize else mean[:3]

    assert gradcheck(fields, input)
    assert gradgradcheck(fields, input)


def eager(input, target, classes, normalize):
    rows = F.normalize(input) if normalize else input
    means, radii = [], []
    for c in range(classes):
        own = rows[target == c]
        means.append(own.mean(0))
        radii.append((own - means[-1]).square().sum(1).mean().sqrt())
    return torch.stack(means), torch.stack(radii)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_matches_eager_pytorch_in_every_dtype(device, dtype, layout, normalize):
    dense = torch.randn(60, 19).to(dtype) + 1
    target = (torch.arange(60) % 4).to(device)
    target[::7] = -100
    wide = dense.to(device, torch.float64).requires_grad_()
    expected = eager(wide, target, 4, normalize)
    grads = [torch.randn_like(value) for value in expected]
    (wanted,) = torch.autograd.grad(expected, wide, grads)
    input = relayout(dense, layout).to(device).requires_grad_()
    _, *actual = class_moments(input, target, 5, normalize=normalize)
    actual = [value[:4] for value in actual]
    narrow = [grad.to(actual[0].dtype) for grad in grads]
    (gradient,) = torch.autograd.grad(actual, input, narrow)
    assert gradient.dtype == dtype and not gradient[::7].any()
    epsilon = max(4 * torch.finfo(dtype).eps, 16 * torch.finfo(actual[0].dtype).eps)
    torch.testing.assert_close(gradient.double(), wanted, rtol=epsilon, atol=epsilon)


def test_each_field_alone_adds_up_to_both(device):
    input, target = samples(device)
    for normalize in (False, True):
        count, *fields = class_moments(input, target, 3, normalize=normalize)
        assert not count.requires_grad
        grads = [torch.randn_like(field) for field in fields]
        both = torch.autograd.grad(fields, input, grads, retain_graph=True)[0]
        parts = [
            torch.autograd.grad(field, input, grad, retain_graph=True)[0]
            for field, grad in zip(fields, grads, strict=True)
        ]
        torch.testing.assert_close(both, parts[0] + parts[1])


def test_radius_zero_has_gradient_zero(device, dtype):
    input = torch.randn(1, 6).to(device, dtype).repeat(5, 1).requires_grad_()
    target = torch.tensor([0, 0, 0, 1, -100], device=device)
    for normalize in (False, True):
        moments = class_moments(input, target, 3, normalize=normalize)
        (gradient,) = torch.autograd.grad(moments.radius.nansum(), input)
        assert not gradient.any()


def test_rows_of_zeros_have_no_gradient_with_normalize(device, dtype):
    input = torch.randn(6, 4).to(device, dtype)
    input[2] = 0
    input.requires_grad_()
    target = torch.zeros(6, dtype=torch.int64, device=device)
    moments = class_moments(input, target, 1, normalize=True)
    (gradient,) = torch.autograd.grad(moments.radius.sum() + moments.mean.sum(), input)
    assert gradient.any(1).tolist() == [True, True, False, True, True, True]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_nan_of_empty_classes_and_ignored_samples_does_not_spread(device, normalize):
    input, target = samples(device)
    with torch.no_grad():
        input[0], input[3, 2] = math.nan, math.nan  # ignored, and in class 2
    target = torch.where(target == 0, 3, target)
    target[0], target[3] = -100, 2
    target[target == 2] = 2
    moments = class_moments(input, target, 5, normalize=normalize)
    assert moments.count[0] == moments.count[4] == 0
    loss = moments.mean.square().sum() + moments.radius.sum()
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    assert not gradient[0].any()
    assert not gradient[(target == 1) | (target == 3)].isnan().any()
    assert gradient[3].isnan().any()
    kept = (target == 1) | (target == 3)
    (second,) = torch.autograd.grad(gradient[kept].sum(), input)
    assert not second[kept].isnan().any() and not second[0].isnan().any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_gradient_of_unit_rows_of_any_length(device, size):
    """The gradient is inversely proportional to the length of a row."""
    input, target = samples(device)
    plain = class_moments(input, target, 3, normalize=True)
    (expected,) = torch.autograd.grad(plain.radius.sum() + plain.mean.sum(), input)
    scaled = (input.detach() * size).float().requires_grad_()
    moments = class_moments(scaled, target, 3, normalize=True)
    (gradient,) = torch.autograd.grad(moments.radius.sum() + moments.mean.sum(), scaled)
    torch.testing.assert_close(gradient.double() * size, expected, rtol=1e-4, atol=1e-6)


def test_gradient_of_merged_moments_matches_the_whole(device):
    input, target = samples(device)
    target[:6] = target[:6].clamp(max=1)  # class 2 is in one part only
    target[-1] = -100

    def gradient(moments):
        loss = (moments.mean[:3] * 0.3).sum() + moments.radius[:3].square().sum()
        return torch.autograd.grad(loss, input)[0]

    parts = (class_moments(input[i : i + 6], target[i : i + 6], 4) for i in (0, 6))
    merged = next(parts).merge(next(parts))
    torch.testing.assert_close(gradient(merged), gradient(class_moments(input, target, 4)))


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(device, normalize):
    input, target = samples(device)
    target[1] = -100
    # With gradients, opcheck would add the sums of all fields to that of the count, an integer.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (input, target, 3, normalize, -100)
    torch.library.opcheck(OPS.class_moments.default, arguments, test_utils=tests)
    opcheck("class_moments", input.detach(), *arguments[1:])


def test_compile_full_graph_with_dynamic_rows(device):
    def step(input, target):
        count, mean, radius = class_moments(input, target, 3, normalize=True)
        return (count.unsqueeze(1) * mean).square().sum() + radius.sum()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (6, 9, 23):
        input, target = samples(device, rows=rows)
        actual, expected = compiled(input, target), step(input, target)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, input), torch.autograd.grad(expected, input)
        )
    assert counter.frame_count == 1


def test_forward_mode_is_an_error_and_jacobians_may_be_vectorized(device):
    input, target = samples(device, rows=6)
    with pytest.raises(NotImplementedError, match="class_moments: no forward-mode"):
        torch.func.jvp(
            lambda input: class_moments(input, target, 3).radius,
            (input.detach(),),
            (input.detach(),),
        )
    for normalize in (False, True):

        def fields(input, normalize=normalize):
            return class_moments(input, target, 3, normalize=normalize)[1:]

        batched = torch.autograd.functional.jacobian(fields, input, vectorize=True)
        single = torch.autograd.functional.jacobian(fields, input)
        torch.testing.assert_close(batched, single)
