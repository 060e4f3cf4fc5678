"""The order of an epoch against torch.randperm, torch.multinomial and WeightedRandomSampler."""

import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from conftest import DEVICE
from marginops.training import MarginSampler, TrainingDynamics, WeightedSampler
from marginops.training.order import as_weights, epoch_order

SIZES = [60_000, 1_000_000]
CASES = {  # the share that is certain, and whether the other weights differ
    "all": (0.0, False),
    "smallest margins": (0.32, False),
    "weights": (0.0, True),
}


def make_weights(case: str, size: int) -> torch.Tensor:
    certain, differ = CASES[case]
    weights = torch.rand(size) + 0.1 if differ else torch.ones(size)
    weights[torch.randperm(size)[: int(certain * size)]] = torch.inf
    return as_weights(weights)


@pytest.mark.skipif(DEVICE != "cpu", reason="samplers work on the CPU")
@pytest.mark.parametrize("provider", ["marginops", "randperm", "multinomial", "WeightedRandom"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def bench_epoch_order(time_call, case, size, provider):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weights = make_weights(case, size)
    k = size if case == "all" else size * 2 // 5
    finite = weights.nan_to_num(posinf=1e6)

    def check(order):
        assert len(set(order.tolist())) == len(order)

    call = {
        "marginops": lambda: epoch_order(weights, k, 0, 1),
        "randperm": lambda: torch.randperm(size),
        "multinomial": lambda: torch.multinomial(finite, k),
        "WeightedRandom": lambda: torch.tensor(
            list(WeightedRandomSampler(finite, k, replacement=False))
        ),
    }[provider]
    time_call(
        call,
        check,
        op="epoch_order",
        shape=f"{size}, {case}",
        dtype="float32",
        provider=provider,
        bytes_read=weights.numel() * weights.element_size(),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="samplers work on the CPU")
@pytest.mark.parametrize("provider", ["marginops", "WeightedRandom"])
@pytest.mark.parametrize("size", SIZES)
def bench_epoch(time_call, size, provider):
    """A whole epoch of ids as Python numbers, the weights of the policy included."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dynamics = TrainingDynamics(size)
    indices, logits = torch.arange(size), torch.randn(size, 10)
    dynamics.update(indices, logits, torch.randint(10, (size,)))
    sampler = MarginSampler(dynamics)
    plain = WeightedRandomSampler(torch.ones(size), len(sampler), replacement=False)

    def epoch():
        dynamics.weights_version = -1
        sampler.set_epoch(0)
        return list(sampler)

    def check(ids):
        assert len(set(ids)) == len(sampler)

    time_call(
        epoch if provider == "marginops" else lambda: list(plain),
        check,
        op="epoch",
        shape=f"{size}",
        dtype="float32",
        provider=provider,
        bytes_read=size * 4,
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="samplers work on the CPU")
def bench_beyond_multinomial(time_call):
    """More samples than torch.multinomial takes."""
    size = 2**24 + 1
    torch.set_num_threads(1)
    sampler = WeightedSampler(torch.rand(size) + 0.1, 1000)
    time_call(
        lambda: list(sampler),
        lambda ids: None,
        op="epoch",
        shape=f"{size}, k = 1000",
        dtype="float32",
        provider="marginops",
        bytes_read=size * 4,
    )
