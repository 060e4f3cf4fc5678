"""Scores of data sets that do not fit into memory: rows of Parquet files, task by task."""

try:
    import pyarrow as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "pyarrow":
        raise
    hint = 'run pip install "marginops[score]"'
    raise ImportError(f"marginops.scoring needs pyarrow; {hint}", name=error.name) from error

from .errors import DataError, OutputError
from .folder import RunFolder
from .plan import Plan, Task, make_plan
from .reductions.base import Reduction
from .scored import ScoredBatch
from .scorer import Scorer

__all__ = [
    "DataError",
    "OutputError",
    "Plan",
    "Reduction",
    "RunFolder",
    "ScoredBatch",
    "Scorer",
    "Task",
    "make_plan",
]
