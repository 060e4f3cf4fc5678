"""Multi-margin regularization and its gradients, against PyTorch code."""

import pytest
import torch
from torch import Tensor

import marginops
from conftest import DEVICE, PROVIDERS, compiled

SHAPES = [(1024, 2048, 1000) if DEVICE == "cpu" else (8192, 2048, 1000)]


def eager(input: Tensor, weight: Tensor, target: Tensor, logits: Tensor) -> Tensor:
    rival = logits.scatter(1, target.unsqueeze(1), -torch.inf).argmax(1)
    distance = (weight[target] - weight[rival]).norm(dim=1)
    return (input.norm(dim=1).max() * distance.mean()).square()


def fused(input: Tensor, weight: Tensor, target: Tensor, logits: Tensor) -> Tensor:
    return marginops.multi_margin_regularization(input, weight, target, logits=logits)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_regularization(time_call, shape, provider):
    """Forward and backward. The logits are given, as in training."""
    samples, features, classes = shape
    torch.manual_seed(0)
    input = torch.randn(samples, features, device=DEVICE)
    weight = torch.randn(classes, features, device=DEVICE) / features**0.5
    target = torch.randint(classes, (samples,), device=DEVICE)
    logits = input @ weight.t()
    inputs = input.requires_grad_(), weight.requires_grad_()
    exact = tuple(value.detach().double().requires_grad_() for value in inputs)
    expected = torch.autograd.grad(eager(*exact, target, logits), exact)
    call = {"marginops": fused, "eager": eager, "compile": compiled(eager)}[provider]

    def check(gradients: tuple[Tensor, ...]) -> None:
        for value, wanted in zip(gradients, expected, strict=True):
            tolerance = 1e-5 * float(wanted.abs().max())
            torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=tolerance)

    time_call(
        lambda: torch.autograd.grad(call(*inputs, target, logits), inputs),
        check,
        op="multi_margin_regularization, forward and backward",
        shape=" x ".join(map(str, shape)),
        dtype="float32",
        provider=provider,
        bytes_read=4 * (input.numel() + 2 * samples * features + logits.numel()),
    )
