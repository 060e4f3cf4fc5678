"""Metrics for torchmetrics. They take batches, in one process or in several."""

from ._backend import usable_backend

try:
    with usable_backend():
        import torchmetrics as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    hint = 'run pip install "marginops[metrics]"'
    raise ImportError(f"marginops.metrics needs torchmetrics; {hint}", name=error.name) from error

from ._summaries import ClassManifoldsSummary, MarginSummary, NeuralCollapseSummary
from .collapse import NeuralCollapse
from .distribution import MarginDistribution
from .manifolds import ClassManifolds

__all__ = [
    "ClassManifolds",
    "ClassManifoldsSummary",
    "MarginDistribution",
    "MarginSummary",
    "NeuralCollapse",
    "NeuralCollapseSummary",
]
