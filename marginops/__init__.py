"""Classification margins in PyTorch, and the selection of samples by them, in fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from . import nn
from ._native import NativeUnavailableWarning
from ._version import __version__
from .norms import log_norm_product, log_spectral_complexity
from .ops.distribution import margin_area, support_vector_counts
from .ops.linear_log_prob import linear_log_prob
from .ops.linear_margin import (
    linear_classification_margin,
    linear_select_classification_margin,
)
from .ops.linear_score import linear_minimal_margin_score, linear_select_minimal_margin
from .ops.linear_statistics import linear_sample_statistics
from .ops.margin import classification_margin, minimal_margin_score
from .ops.moments import ClassMoments, class_moments
from .ops.regularization import multi_margin_regularization
from .ops.select import Selection, select_smallest
from .ops.select_margin import select_classification_margin, select_minimal_margin
from .ops.statistics import SampleStatistics, sample_statistics

if TYPE_CHECKING:
    from . import homogeneity as homogeneity
    from . import metrics as metrics
    from . import networks as networks
    from . import scoring as scoring
    from . import training as training

__all__ = [
    "ClassMoments",
    "NativeUnavailableWarning",
    "SampleStatistics",
    "Selection",
    "__version__",
    "class_moments",
    "classification_margin",
    "linear_classification_margin",
    "linear_log_prob",
    "linear_minimal_margin_score",
    "linear_sample_statistics",
    "linear_select_classification_margin",
    "linear_select_minimal_margin",
    "log_norm_product",
    "log_spectral_complexity",
    "margin_area",
    "minimal_margin_score",
    "multi_margin_regularization",
    "nn",
    "sample_statistics",
    "select_classification_margin",
    "select_minimal_margin",
    "select_smallest",
    "support_vector_counts",
]

# They are imported at their first use, because some need further packages.
_LAZY = ("homogeneity", "metrics", "networks", "scoring", "training")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
