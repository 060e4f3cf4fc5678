"""Checks of the arguments that say what a trainer records, draws and selects."""

from typing import Any

from .. import _checks as checks
from ..training import SelectionSchedule, TrainingDynamics
from ..training.samplers.dynamics_sampler import DynamicsSampler


def check_arguments(sampler: Any, dynamics: Any, select: Any, schedule: Any, key: Any) -> None:
    """Check arguments that belong together."""
    if sampler is not None:
        if not isinstance(sampler, DynamicsSampler):
            raise TypeError(
                f"sampler: expected a MarginSampler or ReductionSampler, got "
                f"{type(sampler).__name__}"
            )
        if sampler.num_replicas != 1:
            raise ValueError(
                f"sampler: expected num_replicas=1, because the trainer shares each epoch among "
                f"the processes, got {sampler.num_replicas}; make it without group, num_replicas "
                "and rank"
            )
        if getattr(sampler, "shrink", False):
            raise ValueError(
                "sampler: expected epochs of one length, because the Trainer reads it once, got "
                "shrink=True; make the sampler without it"
            )
        if dynamics is not None and dynamics is not sampler.dynamics:
            raise ValueError("dynamics: expected sampler.dynamics, got others; leave them out")
    if dynamics is not None and not isinstance(dynamics, TrainingDynamics):
        raise TypeError(f"dynamics: expected TrainingDynamics, got {type(dynamics).__name__}")
    if select is not None:
        checks.check_int("select", select, 1)
        if schedule is not None:
            raise ValueError("schedule: expected either select or schedule, got both")
    if schedule is not None and not isinstance(schedule, SelectionSchedule):
        raise TypeError(f"schedule: expected SelectionSchedule, got {type(schedule).__name__}")
    if not isinstance(key, str):
        raise TypeError(f"key: expected a str, got {type(key).__name__}")
