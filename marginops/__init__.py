"""Fused kernels for classification margins: scores, normalisation and selection in one call."""

from .ops.margin import classification_margin, minimal_margin_score
from .ops.select import (
    Selection,
    select_minimal_margin,
    select_smallest,
    select_smallest_margin,
)

__version__ = "0.1.0"

__all__ = [
    "Selection",
    "classification_margin",
    "minimal_margin_score",
    "select_minimal_margin",
    "select_smallest",
    "select_smallest_margin",
]
