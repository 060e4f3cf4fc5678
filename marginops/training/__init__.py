"""Per-sample training dynamics, samplers, batch selection, reports of epochs, inversion points."""

from typing import TYPE_CHECKING, Any

from .across_ranks import RankSelection, select_across_ranks
from .batches import batch_size, take, to_device
from .comparison import Comparison, compare
from .data_map import DataMap
from .dynamics import TrainingDynamics
from .frontier import Gain
from .indexed import Indexed
from .inversion import InversionMonitor
from .label_issues import LabelIssues, ThresholdSamples, threshold_samples
from .margin_sampler import MarginSampler
from .mislabelled_share import mislabelled_share
from .policies import BelowMeanLoss, SmallestMargins, Uniform
from .reduction import ReductionSampler
from .runs import Stopwatch, TrainingRun
from .schedule import SelectionSchedule, keep_closest
from .scoring import score_batch
from .selection import select_batch
from .stability import straggler_stability
from .strata import BetaWindow, RankPower, Strata
from .weighted_sampler import WeightedSampler

if TYPE_CHECKING:
    from .epoch_report import EpochReport, report_epoch

__all__ = [
    "BelowMeanLoss",
    "BetaWindow",
    "Comparison",
    "DataMap",
    "EpochReport",
    "Gain",
    "Indexed",
    "InversionMonitor",
    "LabelIssues",
    "MarginSampler",
    "RankPower",
    "RankSelection",
    "ReductionSampler",
    "SelectionSchedule",
    "SmallestMargins",
    "Stopwatch",
    "Strata",
    "ThresholdSamples",
    "TrainingDynamics",
    "TrainingRun",
    "Uniform",
    "WeightedSampler",
    "batch_size",
    "compare",
    "keep_closest",
    "mislabelled_share",
    "report_epoch",
    "score_batch",
    "select_across_ranks",
    "select_batch",
    "straggler_stability",
    "take",
    "threshold_samples",
    "to_device",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    """Import the report of an epoch at its first use, because only this part needs torchmetrics."""
    if name in ("EpochReport", "report_epoch"):
        from . import epoch_report as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
