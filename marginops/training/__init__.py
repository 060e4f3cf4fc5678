"""Per-sample training dynamics, batch selection, reports of epochs, and inversion points."""

from typing import TYPE_CHECKING, Any

from .dynamics import TrainingDynamics
from .inversion import InversionMonitor
from .selection import select_batch
from .stability import straggler_stability

if TYPE_CHECKING:
    from .epoch_report import EpochReport, report_epoch

__all__ = [
    "EpochReport",
    "InversionMonitor",
    "TrainingDynamics",
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
