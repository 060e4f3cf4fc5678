"""Fused kernels for classification margins: scores, normalisation and selection in one call."""

from ._native import NativeUnavailableWarning
from ._version import __version__
from .ops.margin import classification_margin, minimal_margin_score
from .ops.select import (
    Selection,
    select_minimal_margin,
    select_smallest,
    select_smallest_margin,
)

__all__ = [
    "NativeUnavailableWarning",
    "Selection",
    "__version__",
    "classification_margin",
    "minimal_margin_score",
    "select_minimal_margin",
    "select_smallest",
    "select_smallest_margin",
]
