"""The check of what adapters take that are built on TrainingProgress alone."""

from typing import Any

from ..training import TrainingProgress


def check_progress(progress: Any, batch_of: Any) -> None:
    """Check a progress, and a function that reads batches or None."""
    if not isinstance(progress, TrainingProgress):
        raise TypeError(f"progress: expected TrainingProgress, got {type(progress).__name__}")
    if batch_of is not None and not callable(batch_of):
        raise TypeError(f"batch_of: expected a function, got {type(batch_of).__name__}")
