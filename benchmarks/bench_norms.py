"""The logarithm of a model's norm product, against a loop in PyTorch."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import marginops.norms
from conftest import DEVICE

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.models_for_norms import Residual, resnet18, with_statistics

LAYERS = (nn.Linear, nn.Conv2d)


def eager(model: nn.Module) -> Tensor:
    """Fold each batch norm into the convolution before it, then add the logarithms of norms."""
    modules = [m for m in model.modules() if isinstance(m, (*LAYERS, nn.BatchNorm2d))]
    pairs = {m.conv1: m.bn1 for m in model.modules() if isinstance(m, Residual)}
    pairs |= {m.conv2: m.bn2 for m in model.modules() if isinstance(m, Residual)}
    shortcuts = [m.shortcut for m in model.modules() if isinstance(m, Residual)]
    pairs |= {model[0]: model[1]} | {m[0]: m[1] for m in shortcuts if isinstance(m, nn.Sequential)}
    total = torch.zeros((), device=DEVICE)
    for layer in modules:
        if isinstance(layer, LAYERS):
            weight = layer.weight
            if layer in pairs:
                norm = pairs[layer]
                scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
                weight = weight * scale.view(-1, 1, 1, 1)
            total = total + torch.linalg.vector_norm(weight).log()
    return total


def floor(model: nn.Module) -> Tensor:
    """One reading of the parameters."""
    return sum(parameter.sum() for parameter in model.parameters())


@pytest.mark.parametrize("provider", ["marginops", "eager", "floor"])
def bench_norms(time_call, provider):
    model = with_statistics(resnet18()).to(DEVICE).requires_grad_(False)
    expected = {"floor": floor}.get(provider, eager)(copy.deepcopy(model).double())
    call = {"marginops": marginops.norms.log_norm_product, "eager": eager, "floor": floor}[provider]
    time_call(
        lambda: call(model),
        lambda result: torch.testing.assert_close(
            result.double(), expected, rtol=1e-4, atol=1.0 if provider == "floor" else 1e-4
        ),
        op="log_norm_product",
        shape="ResNet-18",
        dtype="float32",
        provider=provider,
        bytes_read=sum(p.numel() * p.element_size() for p in model.parameters()),
    )
