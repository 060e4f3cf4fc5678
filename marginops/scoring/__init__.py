"""Scores of data sets that do not fit into memory: rows of Parquet files, task by task."""

try:
    import pyarrow as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    hint = 'run pip install "marginops[score]"'
    raise ImportError(f"marginops.scoring needs pyarrow; {hint}", name=error.name) from error

from .errors import DataError, OutputError, WorkerError
from .reductions.base import Reduction
from .reductions.distribution import Margins
from .reductions.label_issues import SuspiciousLabels
from .reductions.moments import Moments
from .reductions.per_class import SmallestPerClass
from .reductions.smallest import Smallest
from .result import ScoringResult, read_result
from .run import score_files
from .scored import ScoredBatch
from .scorer import Scorer

__all__ = [
    "DataError",
    "Margins",
    "Moments",
    "OutputError",
    "Reduction",
    "ScoredBatch",
    "Scorer",
    "ScoringResult",
    "Smallest",
    "SmallestPerClass",
    "SuspiciousLabels",
    "WorkerError",
    "read_result",
    "score_files",
]
