"""Trainings of a TrainingProgress, whose samples have margins that follow from id and step."""

import io
from collections.abc import Callable
from typing import Any

import torch

from marginops.training import (
    MarginSampler,
    ReductionSampler,
    TrainingDynamics,
    TrainingProgress,
)

N, GLOBAL_BATCH, EPOCHS = 75, 12, 6
MAKE: dict[str, Callable[..., Any]] = {
    "margins": lambda **ranks: MarginSampler(TrainingDynamics(N), seed=4, **ranks),
    "padding": lambda **ranks: MarginSampler(TrainingDynamics(N), num_samples=31, **ranks),
    "shrink": lambda **ranks: ReductionSampler(
        TrainingDynamics(N), 14, trigger=0.5, factor=0.4, shrink=True, **ranks
    ),
}
SIZES = {"margins": [30] * 6, "padding": [31] * 6, "shrink": [75, 30, 14, 14, 14, 14]}
FIRST_STEPS = {"margins": 3, "padding": 3, "shrink": 7}  # the steps of the first epoch


def logits_of(ids: list[int], step: int) -> tuple[torch.Tensor, ...]:
    indices = torch.tensor(ids, dtype=torch.int64)
    margin = (indices * 37 % N) / 20 - 1.2 + step * 0.03 * (indices % 3)
    return indices, torch.stack([margin, torch.zeros(len(ids))], 1), torch.zeros_like(indices)


def run(
    progress: TrainingProgress, last: int = 10**6, divided: tuple[int, int] = (0, 1)
) -> list[list[int]]:
    """Train until ``last`` steps are done; returns the ids of this rank at each step.

    With ``divided``, (rank, count), a loader gives each rank some of the batches.
    """
    sampler, visited = progress.sampler, []
    rank, count = divided
    for epoch in range(progress.next_epoch, EPOCHS):
        progress.begin_epoch(epoch)
        batches = sampler.indices().split(GLOBAL_BATCH // (count * sampler.num_replicas))
        for own in range(0, len(batches), count):
            step = progress.dynamics.num_updates
            if step == last:
                return visited
            ids = batches[own + rank].tolist() if own + rank < len(batches) else []
            progress.update(*logits_of(ids, step))
            visited.append(ids)
    return visited


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
