"""sample_statistics against the same fields in PyTorch and against the loss alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import marginops
from bench_margin import DTYPES, FEW_ROWS, LARGE, make_logits
from conftest import DEVICE, compiled

SHAPES = [(8192, 10), (8192, 1000), (1024, 32000)]
if DEVICE != "cpu":
    SHAPES = [(1280, 1000), *LARGE, FEW_ROWS]
COLUMNS = 64


def eager_statistics(
    logits: Tensor, target: Tensor, features: Tensor | None
) -> tuple[Tensor | None, ...]:
    index = target.unsqueeze(1)
    log_p = logits.log_softmax(1, dtype=torch.float32)
    p = log_p.exp()
    rival_value, rival = logits.scatter(1, index, -torch.inf).max(1)
    margin = logits.gather(1, index).squeeze(1) - rival_value
    largest = logits.topk(2).values
    top2_margin = largest[:, 0] - largest[:, 1]
    loss = -log_p.gather(1, index).squeeze(1)
    entropy = -(p * log_p).sum(1)
    confidence = p.gather(1, index).squeeze(1)
    el2n = p.scatter_add(1, index, p.new_full(index.shape, -1)).norm(dim=1)
    gradient_norm = None
    if features is not None:
        gradient_norm = el2n * (1 + features.square().sum(1)).sqrt()
    correct = logits.argmax(1) == target
    softmax = loss, confidence, entropy, correct, el2n, gradient_norm
    return margin, rival, top2_margin, *softmax, target != -100


def make_case(rows: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    logits = make_logits(rows, classes, dtype)
    target = torch.randint(classes, (rows,), device=DEVICE)
    if DEVICE != "cpu":  # on a GPU PyTorch computes the norms of features separately
        return logits, target, None
    return logits, target, torch.randn(rows, COLUMNS, device=DEVICE).to(dtype)


def fused(logits: Tensor, target: Tensor, features: Tensor | None) -> tuple[Tensor | None, ...]:
    return marginops.sample_statistics(logits, target, input=features)


@pytest.mark.parametrize("provider", ["marginops", "eager", "compile", "cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_statistics(time_call, shape, dtype, provider):
    if DEVICE != "cpu" and provider == "compile" and shape not in (SHAPES[0], SHAPES[3]):
        pytest.skip("on a GPU few shapes are worth compiling for")
    logits, target, features = make_case(*shape, dtype)
    exact_features = None if features is None else features.double()
    expected = eager_statistics(logits.double(), target, exact_features)
    rounding = 1e-4 if dtype == torch.float32 else 2e-2

    def check(result):
        pairs = [(result, expected[3])]
        if provider != "cross_entropy":
            pairs = list(zip(result, expected, strict=True))
        for value, exact in pairs:
            if exact is None:
                assert value is None
                continue
            torch.testing.assert_close(value.double(), exact.double(), rtol=rounding, atol=rounding)

    call = {
        "marginops": fused,
        "eager": eager_statistics,
        "compile": compiled(eager_statistics),
        "cross_entropy": lambda logits, target, _: cross_entropy(logits, target, reduction="none"),
    }[provider]
    time_call(
        lambda: call(logits, target, features),
        check,
        op="sample_statistics",
        shape=" x ".join(map(str, shape)),
        dtype=dtype,
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
        # The target and the rival, six or seven numbers, a bool, and the features.
        other_bytes=41 * shape[0] + (0 if features is None else (4 + 4 * COLUMNS) * shape[0]),
    )


@pytest.mark.parametrize("provider", ["marginops", "eager", "cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES if DEVICE == "cpu" else [SHAPES[0], SHAPES[3]], ids=str)
def bench_statistics_backward(time_call, shape, dtype, provider):
    """The gradients of loss and margin together; of the loss alone for cross_entropy."""
    logits, target, features = make_case(*shape, dtype)
    weights = torch.randn(2, shape[0], device=DEVICE)

    def results(provider: str, logits: Tensor) -> tuple[Tensor, ...]:
        if provider == "cross_entropy":
            return (cross_entropy(logits, target, reduction="none"),)
        fields = {"marginops": fused, "eager": eager_statistics}[provider]
        margin, _, _, loss, *_ = fields(logits, target, features)
        return loss, margin

    def gradient(outputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        grads = [weight.to(output.dtype) for weight, output in zip(weights, outputs, strict=False)]
        return torch.autograd.grad(outputs, logits, grads, retain_graph=True)[0]

    exact_logits = logits.double().requires_grad_()
    reference = "cross_entropy" if provider == "cross_entropy" else "eager"
    expected = gradient(results(reference, exact_logits), exact_logits)
    rounding = 1e-4 if dtype == torch.float32 else 2e-2
    logits.requires_grad_()
    outputs = results(provider, logits)
    time_call(
        lambda: gradient(outputs, logits),
        lambda result: torch.testing.assert_close(
            result.double(), expected, rtol=rounding, atol=rounding
        ),
        op="sample_statistics backward",
        shape=" x ".join(map(str, shape)),
        dtype=dtype,
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
        other_bytes=logits.numel() * logits.element_size(),
    )
