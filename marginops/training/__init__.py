"""Training dynamics, samplers, batch selection, recorded runs, reports of epochs, inversion."""

from typing import TYPE_CHECKING, Any

from .batches import batch_size, take, to_device
from .comparison.comparison import Comparison, compare
from .comparison.frontier import Gain
from .comparison.runs import Stopwatch, TrainingRun
from .dynamics.data_map import DataMap
from .dynamics.label_issues import LabelIssues, ThresholdSamples, threshold_samples
from .dynamics.mislabelled_share import mislabelled_share
from .dynamics.training_dynamics import TrainingDynamics
from .indexed import Indexed
from .inversion import InversionMonitor
from .progress import TrainingProgress
from .recording.recorder import RunRecorder
from .samplers.margin_sampler import MarginSampler
from .samplers.policies import BelowMeanLoss, SmallestMargins, Uniform
from .samplers.reduction_sampler import ReductionSampler
from .samplers.strata import BetaWindow, RankPower, Strata
from .samplers.weighted_sampler import WeightedSampler
from .selection.across_ranks import RankSelection, select_across_ranks
from .selection.schedule import SelectionSchedule, keep_closest
from .selection.scoring import score_batch
from .selection.selection import select_batch
from .stability import straggler_stability

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
    "RunRecorder",
    "SelectionSchedule",
    "SmallestMargins",
    "Stopwatch",
    "Strata",
    "ThresholdSamples",
    "TrainingDynamics",
    "TrainingProgress",
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
