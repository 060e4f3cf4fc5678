"""A part of the samples, as if it were the whole data set."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks as checks
from ..dynamics.training_dynamics import TrainingDynamics


def checked_subset(subset: Tensor, population: int) -> Tensor:
    """Check the samples of a subset; returns them in ascending order, on the CPU."""
    checks.check_indices("subset", subset, "[M]")
    ordered, counts = subset.cpu().unique(return_counts=True)
    if len(ordered) == 0:
        raise ValueError("subset: expected at least one sample, got none")
    if ordered[0] < 0 or ordered[-1] >= population:
        raise ValueError(
            f"subset: expected samples in [0, {population}), got {int(ordered[0])} to "
            f"{int(ordered[-1])}; make the dynamics for all samples of the data set"
        )
    if counts.max() > 1:
        raise ValueError(
            f"subset: expected different samples, got {int(ordered[counts.argmax()])} "
            f"{int(counts.max())} times"
        )
    return ordered


def all_in(subset: Tensor, samples: Tensor) -> bool:
    """Whether a subset, in ascending order, has all samples of a batch."""
    places = torch.searchsorted(subset, samples).clamp(max=len(subset) - 1)
    return bool((subset[places] == samples).all())


def limited_to(allowed: Tensor, dynamics: TrainingDynamics) -> TrainingDynamics:
    """Dynamics to which all other samples look as if they were never seen, for reading only.

    Args:
        allowed: ``[N]`` bool, on any device.
        dynamics: The dynamics, whose memory the new ones share in part.
    """
    state, allowed = dynamics._state, allowed.to(dynamics.device)
    last_seen = torch.where(allowed, state.last_seen, -1)
    counts = torch.where(allowed[:, None], state.counts, 0)
    limited = TrainingDynamics.__new__(TrainingDynamics)
    limited._set(
        dynamics.num_samples,
        dynamics.decay,
        state._replace(last_seen=last_seen, counts=counts),
    )
    return limited
