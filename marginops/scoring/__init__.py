"""Scores of data sets that do not fit into memory: rows of Parquet files, task by task."""

from .errors import DataError, OutputError
from .reductions.base import Reduction
from .scored import ScoredBatch

__all__ = [
    "DataError",
    "OutputError",
    "Reduction",
    "ScoredBatch",
]
