"""Checks of the arguments that say what a trainer draws and selects."""

from typing import Any

from .. import _checks as checks
from ..training import SelectionSchedule


def check_arguments(sampler: Any, select: Any, schedule: Any, key: Any) -> None:
    """Check what TrainingProgress does not check."""
    if getattr(sampler, "num_replicas", 1) != 1:
        raise ValueError(
            "sampler: expected num_replicas=1, because the trainer shares each epoch among the "
            f"processes, got {sampler.num_replicas}; make it without group, num_replicas and rank"
        )
    if getattr(sampler, "shrink", False):
        raise ValueError(
            "sampler: expected epochs of one length, because the Trainer reads it once, got "
            "shrink=True; make the sampler without it"
        )
    if select is not None:
        checks.check_int("select", select, 1)
    if schedule is not None and not isinstance(schedule, SelectionSchedule):
        raise TypeError(f"schedule: expected SelectionSchedule, got {type(schedule).__name__}")
    if not isinstance(key, str):
        raise TypeError(f"key: expected a str, got {type(key).__name__}")
