"""The linear head without logits, against the ops on all logits and the product alone.

A shape is samples x features x classes.
"""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import marginops
from conftest import DEVICE, compiled, peak_memory, peer

LARGE, SMALL = (8192, 768, 32000), (8192, 512, 1000)
CASES = [(LARGE, torch.float32), (LARGE, torch.bfloat16), (SMALL, torch.float32)]
BACKWARD_CASES = [((2048, 768, 32000), torch.float32), (SMALL, torch.float32)]
if DEVICE != "cpu":
    CASES.insert(0, ((8192, 4096, 128_000), torch.bfloat16))


def make_head(
    rows: int, columns: int, classes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(rows, columns, device=DEVICE).to(dtype)
    weight = (torch.randn(classes, columns, device=DEVICE) / columns**0.5).to(dtype)
    return features, weight, torch.randint(classes, (rows,), device=DEVICE)


def chunked_cross_entropy(
    features: Tensor, weight: Tensor, target: Tensor, reduction: str
) -> Tensor:
    """The function of PyTorch, which works in chunks. Only the newest versions have it."""
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(
        features, weight, target, reduction=reduction, options=options
    )


def liger_cross_entropy(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The function of Liger, which computes gradients in the forward call if they are needed."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(features, weight, target, reduction="none")


def cut_cross_entropy(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(features, weight, target, reduction="none")


def facts(op: str, shape: tuple[int, ...], dtype: torch.dtype, provider: str) -> dict[str, object]:
    rows, _, classes = shape
    return {
        "op": op,
        "shape": " x ".join(map(str, shape)),
        "dtype": dtype,
        "provider": provider,
        "bytes_read": rows * classes * dtype.itemsize,
    }


def close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rounding = 1e-3 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(result.double(), expected.double(), rtol=rounding, atol=rounding)


PEERS = {"liger": liger_cross_entropy, "cut_cross_entropy": cut_cross_entropy}
# Functions that compute the loss alone.
LOSSES = {"linear_cross_entropy": partial(chunked_cross_entropy, reduction="none"), **PEERS}


@pytest.mark.parametrize("provider", ["marginops", "unfused", "product", *LOSSES])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def bench_linear_statistics(time_call, shape, dtype, provider):
    if provider in PEERS and (DEVICE == "cpu" or dtype == torch.float32):
        pytest.skip("this library needs a GPU and bfloat16")
    features, weight, target = make_head(*shape, dtype)
    checked = slice(0, 64)
    exact = marginops.sample_statistics(
        features[checked].double() @ weight.double().t(), target[checked]
    )
    buffer = features.new_empty((shape[0], shape[2]) if provider == "product" else 0)

    def unfused() -> marginops.SampleStatistics:
        logits = functional.linear(features, weight)
        return marginops.sample_statistics(logits, target, input=features)

    def check(result):
        if provider == "product":
            return
        loss = result if provider in LOSSES else result.loss
        close(loss[checked], exact.loss, dtype)
        if provider not in LOSSES:
            close(result.margin[checked], exact.margin, dtype)

    call = {
        "marginops": lambda: marginops.linear_sample_statistics(features, weight, target),
        "unfused": unfused,
        "product": lambda: torch.mm(features, weight.t(), out=buffer),
        **{name: partial(loss, features, weight, target) for name, loss in LOSSES.items()},
    }[provider]
    if provider in PEERS:
        peer(provider, call, check)
    time_call(
        call,
        check,
        peak_mib=peak_memory(call),
        **facts("linear_sample_statistics", shape, dtype, provider),
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="the default of the CPU is already chosen")
@pytest.mark.parametrize("mebibytes", [16, 32, 64, 128, 256])
def bench_buffer(time_call, mebibytes):
    """The size of the buffer: small ones stay in the cache, large ones have faster products."""
    shape, dtype = CASES[0]
    features, weight, target = make_head(*shape, dtype)
    exact = marginops.sample_statistics(features[:64].double() @ weight.double().t(), target[:64])

    def call() -> marginops.SampleStatistics:
        return marginops.linear_sample_statistics(
            features, weight, target, chunk_bytes=mebibytes << 20
        )

    time_call(
        call,
        lambda result: close(result.loss[:64], exact.loss, dtype),
        peak_mib=peak_memory(call),
        **facts(f"linear_sample_statistics, buffer of {mebibytes} MiB", shape, dtype, "marginops"),
    )


@pytest.mark.parametrize("provider", ["marginops", "unfused", "product"])
@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def bench_linear_selection(time_call, shape, dtype, provider):
    features, weight, _ = make_head(*shape, dtype)
    buffer = features.new_empty((shape[0], shape[2]) if provider == "product" else 0)
    k = shape[0] // 10

    def unfused() -> marginops.Selection:
        return marginops.select_minimal_margin(functional.linear(features, weight), weight, k=k)

    def check(result):
        if provider == "product":
            return
        chosen = result.indices[:64]
        logits = features[chosen].double() @ weight.double().t()
        close(result.scores[:64], marginops.minimal_margin_score(logits, weight.double()), dtype)

    call = {
        "marginops": lambda: marginops.linear_select_minimal_margin(features, weight, k=k),
        "unfused": unfused,
        "product": lambda: torch.mm(features, weight.t(), out=buffer),
    }[provider]
    time_call(
        call,
        check,
        peak_mib=peak_memory(call),
        **facts("linear_select_minimal_margin", shape, dtype, provider),
    )


@pytest.mark.parametrize("provider", ["marginops", "unfused", "linear_cross_entropy"])
@pytest.mark.parametrize(("shape", "dtype"), BACKWARD_CASES, ids=str)
def bench_linear_training(time_call, shape, dtype, provider):
    """The mean loss and its gradients for features and weight."""
    features, weight, target = make_head(*shape, dtype)
    losses = {
        "marginops": lambda f, w: marginops.linear_sample_statistics(f, w, target).mean_loss(),
        "unfused": lambda f, w: functional.cross_entropy(functional.linear(f, w), target),
        "linear_cross_entropy": lambda f, w: chunked_cross_entropy(f, w, target, "mean"),
    }
    features.requires_grad_()
    weight.requires_grad_()

    def gradients(provider: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses[provider](features, weight), (features, weight))

    expected = gradients("unfused")

    def check(result):
        for value, exact in zip(result, expected, strict=True):
            close(value / exact.abs().max(), exact / exact.abs().max(), dtype)

    call = lambda: gradients(provider)  # noqa: E731
    time_call(
        call,
        check,
        peak_mib=peak_memory(call),
        **facts("linear_sample_statistics, loss and gradients", shape, dtype, provider),
    )


def log_probabilities(features: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies as a user would write them."""
    log_p = functional.linear(features, weight).float().log_softmax(-1)
    own = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return own, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("provider", ["marginops", "eager", "compile", "linear_cross_entropy"])
@pytest.mark.parametrize("with_gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize(("shape", "dtype"), BACKWARD_CASES[:1], ids=str)
def bench_log_prob(time_call, shape, dtype, with_gradients, provider):
    """Log-probability and entropy of tokens; ``linear_cross_entropy`` has the first alone."""
    if with_gradients and provider == "linear_cross_entropy":
        pytest.skip("bench_linear_training measures its gradients, of the mean loss")
    features, weight, target = make_head(*shape, dtype)

    def fused(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return marginops.linear_log_prob(features, weight, target, return_entropy=True)

    def plain(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return log_probabilities(features, weight, target)

    def losses(features: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (-chunked_cross_entropy(features, weight, target, "none"),)

    results = {
        "marginops": fused,
        "eager": plain,
        "compile": compiled(plain),
        "linear_cross_entropy": losses,
    }[provider]

    def call() -> tuple[Tensor, ...]:
        if not with_gradients:
            with torch.no_grad():
                return results(features, weight)
        leaves = [value.detach().requires_grad_() for value in (features, weight)]
        returned = results(*leaves)
        total = sum(value.sum() for value in returned)
        return *returned, *torch.autograd.grad(total, leaves)

    def check(result: tuple[Tensor, ...]) -> None:
        own, entropy = log_probabilities(features[:64].double(), weight.double(), target[:64])
        close(result[0][:64], own, dtype)
        if provider != "linear_cross_entropy":
            close(result[1][:64], entropy, dtype)

    name = "linear_log_prob, " + ("results and gradients" if with_gradients else "results")
    time_call(call, check, peak_mib=peak_memory(call), **facts(name, shape, dtype, provider))
