"""Models for the tests of rates, and checks that hold for all rates."""

import copy
import math

import torch
from torch import nn

from marginops.homogeneity import log_scale, rates, rescale


def seeded(model: nn.Module, seed: int = 4) -> nn.Module:
    """The model in float64 with random values everywhere, biases and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.5 + 0.1)
                if name.endswith("running_var"):
                    value.abs_().add_(0.1)
    return model


class Function(nn.Module):
    """A function of its inputs and of named parameters with these shapes."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        seeded(self)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def checked_rates(model, *inputs, tolerance=1e-9):
    """The rates of a model, after a check of Euler's identity and of the scaled output."""
    found = rates(model, inputs)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(rate >= 0 for rate in found.values())
    output = model(*inputs)
    assert output.detach().abs().max() > 1e-6
    direction = torch.randn(output.shape, dtype=output.dtype)
    projected = (output * direction).sum()
    gradients = torch.autograd.grad(projected, list(model.parameters()), allow_unused=True)
    derivative = sum(
        (rate * gradient * value).sum()
        for rate, gradient, value in zip(found.values(), gradients, model.parameters(), strict=True)
        if gradient is not None
    )
    torch.testing.assert_close(derivative, projected, rtol=tolerance, atol=tolerance)
    alpha = 0.7
    grown = copy.deepcopy(model)
    rescale(grown, found, alpha)
    torch.testing.assert_close(
        grown(*inputs), math.exp(alpha) * output, rtol=tolerance, atol=tolerance
    )
    shift = log_scale(grown, found) - log_scale(model, found)
    torch.testing.assert_close(shift.item(), alpha, rtol=1e-12, atol=1e-12)
    return found
