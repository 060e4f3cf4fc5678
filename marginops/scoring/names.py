"""Names of statistics by what they are and what they need."""

from .statistics import CLASSES, LABELLED, STATISTICS

NEED_TARGET = LABELLED
NEED_HEAD = ("gradient_norm", "minimal_margin")
# Classes and truth values are no scores.
SCORES = tuple(name for name in STATISTICS if name not in CLASSES | {"correct"})

__all__ = ["NEED_HEAD", "NEED_TARGET", "SCORES", "STATISTICS"]
