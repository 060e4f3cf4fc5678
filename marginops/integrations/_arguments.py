"""Checks of arguments that several adapters have."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .. import _checks as checks
from ..training import SelectionSchedule, TrainingDynamics, TrainingProgress


def check_selection(select: Any, schedule: Any) -> None:
    """Check how many samples of a batch stay, and when."""
    if select is not None:
        checks.check_int("select", select, 1)
    if schedule is not None and not isinstance(schedule, SelectionSchedule):
        raise TypeError(f"schedule: expected a SelectionSchedule, got {type(schedule).__name__}")


def check_progress(progress: Any, batch_of: Any) -> None:
    """Check a progress, and a function that reads batches or None."""
    if not isinstance(progress, TrainingProgress):
        raise TypeError(f"progress: expected TrainingProgress, got {type(progress).__name__}")
    if batch_of is not None and not callable(batch_of):
        raise TypeError(f"batch_of: expected a function, got {type(batch_of).__name__}")


def check_size(name: str, size: int, num_samples: int) -> None:
    """Check that a data set has as many samples as the dynamics."""
    if size != num_samples:
        raise ValueError(
            f"{name}: expected {num_samples} samples as in the dynamics, got {size}; make "
            f"TrainingDynamics({size})"
        )


def warn_of_waiting(dynamics: TrainingDynamics, device: torch.device) -> None:
    """Tell a user whose training on a GPU waits in each step for dynamics elsewhere."""
    if device.type == "cuda" and dynamics.device.type != "cuda":
        warnings.warn(
            f"dynamics: expected them on the device of the training, {device.type}, got "
            f"{dynamics.device}; each step waits for the GPU. Make "
            'TrainingDynamics(num_samples, device="cuda")',
            stacklevel=2,
        )
