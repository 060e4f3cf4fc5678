"""Scores of data sets that do not fit into memory: rows of Parquet files, task by task."""

from .errors import DataError, OutputError
from .reductions.base import Reduction
from .reductions.distribution import Margins
from .reductions.label_issues import SuspiciousLabels
from .reductions.moments import Moments
from .reductions.per_class import SmallestPerClass
from .reductions.smallest import Smallest
from .scored import ScoredBatch

__all__ = [
    "DataError",
    "Margins",
    "Moments",
    "OutputError",
    "Reduction",
    "ScoredBatch",
    "Smallest",
    "SmallestPerClass",
    "SuspiciousLabels",
]
