"""Samplers and dynamics whatever torch's default device and dtype are."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from marginops.training import (
    BelowMeanLoss,
    BetaWindow,
    MarginSampler,
    RankPower,
    ReductionSampler,
    SmallestMargins,
    Strata,
    TrainingDynamics,
    Uniform,
    mislabelled_share,
    threshold_samples,
)

N, EPOCHS = 20, 6


@pytest.fixture
def other_defaults() -> Iterator[None]:
    """A program that works on a GPU in float64. The meta device stands for the GPU."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def epochs_of(sampler: Any) -> list[list[int]]:
    """The epochs of a sampler, each from a state that went through a copy."""
    dynamics, visited = sampler.dynamics, []
    logits = torch.arange(3.0 * N, dtype=torch.float32, device="cpu").sin().view(N, 3)
    target = torch.zeros(N, dtype=torch.int64, device="cpu")
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        dynamics.load_state_dict(dynamics.state_dict())
        visited.append(list(sampler))
        indices = torch.tensor(visited[-1], device="cpu")
        dynamics.update(indices, logits[indices], target[indices])
        if isinstance(sampler, MarginSampler) and sampler.unbiased:
            assert sampler.loss_weights(indices).dtype == torch.float32
    return visited


POLICIES = [
    SmallestMargins(skip_hardest=mislabelled_share),
    *(Strata(), BetaWindow(), RankPower(), BelowMeanLoss(), Uniform(0.5)),
]
SAMPLERS: list[Any] = [
    *(lambda policy=policy: MarginSampler(TrainingDynamics(N), policy) for policy in POLICIES),
    lambda: MarginSampler(
        TrainingDynamics(N),
        labels=torch.arange(N, device="cpu") % 2,
        class_floor=0.1,
        num_epochs=EPOCHS,
    ),
    lambda: ReductionSampler(TrainingDynamics(N), 3, trigger=0.1),
    lambda: ReductionSampler(TrainingDynamics(N), 3, trigger=0.1, choice="random", shrink=True),
]


@pytest.mark.parametrize("case", range(len(SAMPLERS)))
def test_epochs_are_those_of_other_defaults(case: int, request: pytest.FixtureRequest) -> None:
    expected = epochs_of(SAMPLERS[case]())
    request.getfixturevalue("other_defaults")
    sampler = SAMPLERS[case]()
    assert epochs_of(sampler) == expected
    assert sampler.dynamics.weights.dtype == torch.float32
    if isinstance(sampler, ReductionSampler):
        assert sampler.kept.device.type == "cpu"
        assert len(ReductionSampler(TrainingDynamics(N), 3).kept) == N


def test_read_outs_need_no_defaults(other_defaults: None) -> None:
    dynamics = MarginSampler(TrainingDynamics(N)).dynamics
    assert dynamics.to_table()["index"].to_pylist() == list(range(N))
    target = torch.zeros(N, dtype=torch.int64, device="cpu")
    assert len(threshold_samples(target, 1).indices) == N // 2
