"""Fused kernels for classification margins: scores, normalisation and selection in one call."""

from . import nn
from ._native import NativeUnavailableWarning
from ._version import __version__
from .ops.linear import (
    linear_classification_margin,
    linear_minimal_margin_score,
    linear_sample_statistics,
    linear_select_minimal_margin,
    linear_select_smallest_margin,
)
from .ops.margin import classification_margin, minimal_margin_score
from .ops.regularization import multi_margin_regularization
from .ops.select import (
    Selection,
    select_minimal_margin,
    select_smallest,
    select_smallest_margin,
)
from .ops.statistics import SampleStatistics, sample_statistics

__all__ = [
    "NativeUnavailableWarning",
    "SampleStatistics",
    "Selection",
    "__version__",
    "classification_margin",
    "linear_classification_margin",
    "linear_minimal_margin_score",
    "linear_sample_statistics",
    "linear_select_minimal_margin",
    "linear_select_smallest_margin",
    "minimal_margin_score",
    "multi_margin_regularization",
    "nn",
    "sample_statistics",
    "select_minimal_margin",
    "select_smallest",
    "select_smallest_margin",
]
