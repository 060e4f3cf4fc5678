"""Parameters near the limits of a dtype, and parameters that are no ordinary tensors."""

import math

import pytest
import torch
from torch import nn

from marginops import classification_margin
from marginops.homogeneity import lambda_seminorm, log_scale, rates, rescale


@pytest.mark.parametrize("size", [1e-290, 1e-150, 1e150, 1e290])
def test_squares_beyond_float64(size):
    a = torch.tensor([3 * size, 4 * size], dtype=torch.float64, requires_grad=True)
    small, single = torch.ones(2, dtype=torch.float64), torch.ones(2)
    parameters = {"a": a, "b": single, "c": small}
    given_rates = {"a": 1.0, "b": 0.0, "c": 0.0}
    seminorm, scale = lambda_seminorm(parameters, given_rates), log_scale(parameters, given_rates)
    assert seminorm.item() == pytest.approx(5 * size, rel=1e-15)
    assert scale.item() == pytest.approx(math.log(5 * size), rel=1e-14)
    gradient = torch.autograd.grad(seminorm, a)[0]
    assert gradient.tolist() == pytest.approx([0.6, 0.8], rel=1e-14)
    gradient = torch.autograd.grad(scale, a)[0] * size
    assert gradient.tolist() == pytest.approx([0.12, 0.16], rel=1e-14)
    logits, target = torch.tensor([[size, 0]], dtype=torch.float64), torch.tensor([0])
    for version in ("tau", "lambda_max"):
        log_norm = log_scale(parameters, given_rates, version=version)
        found = classification_margin(logits, target, log_norm=log_norm)
        assert found.item() == pytest.approx(0.2, rel=1e-12)
    zeros = {"a": a, "b": torch.zeros(2), "c": 0 * small}
    assert lambda_seminorm(zeros, {"a": 1.0, "b": 0.5, "c": 0.25}).item() == seminorm.item()
    both = lambda_seminorm(parameters, {"a": 1.0, "b": 0.0, "c": 0.5}).item()
    assert both == pytest.approx(math.hypot(5 * size, 1), rel=1e-15)


def test_rescale_by_a_factor_beyond_float32():
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(1, 1, bias=False).to(dtype)
        nn.init.constant_(layer.weight, 2.0**-100)
        rescale(layer, {"weight": 1.0}, 140 * math.log(2))
        assert layer.weight.item() == pytest.approx(2.0**40, rel=torch.finfo(dtype).eps)


class Packed(torch.Tensor):
    """A tensor whose values another tensor holds."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    "function",
    [
        lambda_seminorm,
        log_scale,
        lambda p, r: log_scale(p, r, version="lambda_max"),
        lambda p, r: rescale(p, r, 1.0),
    ],
)
def test_parameters_that_are_no_ordinary_tensors(function):
    for value, kind, message in (
        (nn.UninitializedParameter(), ValueError, "expected 'a' to be initialized"),
        (torch.eye(2).to_sparse(), TypeError, "for 'a', got layout torch.sparse_coo"),
        (Packed(), TypeError, "for 'a', got Packed; measure the model before"),
    ):
        module = nn.Module()
        module._parameters["a"] = value
        with pytest.raises(kind, match=f"^parameters: .*{message}"):
            function(module, {"a": 1.0})
        if not nn.parameter.is_lazy(value):
            with pytest.raises(kind, match=f"^model: .*{message}"):
                rates(module, torch.ones(1, 2))


def test_parameters_without_values():
    with pytest.raises(ValueError, match=r"^parameters: expected tensors with values, got .* meta"):
        log_scale(nn.Linear(2, 2, device="meta"), {"weight": 1.0, "bias": 1.0})
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"^model: expected 'weight' to be initialized"):
        rates(lazy, torch.ones(1, 2))
    assert nn.parameter.is_lazy(lazy.weight)
