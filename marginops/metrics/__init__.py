"""Metrics for torchmetrics. They take batches, in one process or in several."""

try:
    import torchmetrics as _  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torchmetrics":
        raise
    hint = 'run pip install "marginops[metrics]"'
    raise ImportError(f"marginops.metrics needs torchmetrics; {hint}", name=error.name) from error

from .collapse import NeuralCollapse, NeuralCollapseSummary
from .distribution import MarginDistribution, MarginSummary
from .manifolds import ClassManifolds, ClassManifoldsSummary

__all__ = [
    "ClassManifolds",
    "ClassManifoldsSummary",
    "MarginDistribution",
    "MarginSummary",
    "NeuralCollapse",
    "NeuralCollapseSummary",
]
