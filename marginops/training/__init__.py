"""Batch selection, reports of epochs, and the inversion points and stragglers of training."""

from typing import TYPE_CHECKING, Any

from .comparison import Comparison, compare
from .frontier import Gain
from .inversion import InversionMonitor
from .runs import Stopwatch, TrainingRun
from .selection import select_batch
from .stability import straggler_stability

if TYPE_CHECKING:
    from .epoch_report import EpochReport, report_epoch

__all__ = [
    "Comparison",
    "EpochReport",
    "Gain",
    "InversionMonitor",
    "Stopwatch",
    "TrainingRun",
    "compare",
    "report_epoch",
    "select_batch",
    "straggler_stability",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the report of an epoch at its first use, because only this part needs torchmetrics."""
    if name in ("EpochReport", "report_epoch"):
        from . import epoch_report as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
