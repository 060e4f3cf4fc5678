"""log_norm_product: weights that are quantised, sharded, of other kinds, or far from 1."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from helpers.sharded import fully_sharded, one_process
from marginops.norms import log_norm_product, log_spectral_complexity


def frobenius(*weights: torch.Tensor) -> float:
    return sum(weight.detach().double().norm().log().item() for weight in weights)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def quantized() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp().eval(), {nn.Linear})


class Packed(torch.Tensor):
    """A tensor whose values are those of another tensor, as in packages for quantisation."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values)
        raise NotImplementedError(func)


class Named(torch.Tensor):
    """A tensor that has its values itself."""


def with_weight(weight) -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


def test_quantized_layers():
    with pytest.raises(ValueError, match=r"^model: .* got 0\._packed.*; measure the model before"):
        log_norm_product(quantized())
    with pytest.raises(ValueError, match=r"^model: .* got 0\._packed"):
        log_norm_product(nn.Sequential(*quantized(), nn.Linear(3, 3)))
    with pytest.raises(TypeError, match=r"^model: .* 0 \(torch.nn.Linear\) .* got Packed; measure"):
        log_norm_product(with_weight(Packed(torch.ones(2, 2))))
    with pytest.raises(TypeError, match=r"^model: .* got torch.int8; measure the model before"):
        log_norm_product(with_weight(torch.ones(2, 2, dtype=torch.int8)))
    with pytest.raises(ValueError, match=r"^model: .* to have 2 dimensions, got shape \[4\]; if"):
        log_norm_product(with_weight(torch.ones(4)))


def test_weights_of_other_kinds_that_count():
    named = with_weight(torch.ones(2, 2).as_subclass(Named))
    for norm in ("frobenius", "spectral"):
        found = log_norm_product(named, norm=norm)
        assert type(found) is torch.Tensor and found.item() == pytest.approx(math.log(2))
    layer = nn.Linear(2, 2)
    del layer.weight
    layer.weight = torch.ones(2, 2)
    assert log_norm_product(nn.Sequential(layer)).item() == pytest.approx(math.log(2))
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", torch.eye(2)))
    with pytest.raises(ValueError, match="hooks before its forward"):
        log_norm_product(nn.Sequential(layer))
    layer = nn.Linear(2, 2)
    prune.ln_structured(layer, "weight", 0.5, 2, 0)
    prune.remove(layer, "weight")
    assert log_norm_product(layer).item() == pytest.approx(frobenius(layer.weight))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_sharded_models():
    plain = mlp()
    message = r"^model: .* a DTensor as weight of 0 \(torch.nn.Linear\); gather .* full_tensor\(\)"
    with one_process() as mesh:
        model = fully_sharded(copy.deepcopy(plain), mesh)
        for norm in ("frobenius", "spectral"):
            with pytest.raises(TypeError, match=message):
                log_norm_product(model, norm=norm)
        gathered = {name: value.full_tensor() for name, value in model.named_parameters()}
        model.unshard()
        with pytest.raises(ValueError, match=r"^model: .* copy.deepcopy .* gather it first"):
            log_norm_product(model)
    plain.load_state_dict(gathered)
    assert log_norm_product(plain).item() == pytest.approx(
        frobenius(plain[0].weight, plain[2].weight), rel=1e-6
    )


@pytest.mark.parametrize(("weight", "gamma"), [(1e30, 1e30), (1e-30, 1e-30), (1e30, 1e-30)])
def test_folding_neither_overflows_nor_underflows(weight, gamma):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3, eps=0.0)).eval()
    nn.init.eye_(model[0].weight).data.mul_(weight)
    nn.init.constant_(model[1].weight, gamma)
    one = math.log(weight) + math.log(gamma)
    found = log_norm_product(model, norm="spectral")
    assert found.item() == pytest.approx(one, rel=1e-5, abs=1e-5)
    # The spectral complexity of c times the unit matrix is 3 c.
    complexity = log_spectral_complexity(model)
    assert complexity.item() == pytest.approx(one + math.log(3), rel=1e-5, abs=1e-5)
