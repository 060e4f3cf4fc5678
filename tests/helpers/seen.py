"""Training dynamics of samples with given last margins."""

from collections.abc import Sequence

import torch
from torch import Tensor

from marginops.training import TrainingDynamics


def see(dynamics: TrainingDynamics, ids: Sequence[int] | Tensor, margins: Sequence[float]) -> None:
    """Add a visit of ``ids``. Their logits are (margin, 0), and their target is 0."""
    values = torch.as_tensor(margins, dtype=torch.float32)
    logits = torch.stack([values, torch.zeros_like(values)], 1)
    target = torch.zeros(len(values), dtype=torch.int64)
    dynamics.update(torch.as_tensor(ids, dtype=torch.int64), logits, target)


def seen(margins: Sequence[float] | Tensor) -> TrainingDynamics:
    """Dynamics that saw every sample once."""
    dynamics = TrainingDynamics(len(margins))
    see(dynamics, range(len(margins)), margins)
    return dynamics
