"""Training with margins: select batches, find inversion and stragglers, and data to try it on."""

from ..evaluation import evaluation_mode
from .data import ClassificationData, DataError, load_digits, load_fashion_mnist
from .inversion import InversionMonitor, straggler_stability
from .loop import Sampling, TrainingHistory, predict, train
from .selection import last_linear, select_batch

__all__ = [
    "ClassificationData",
    "DataError",
    "InversionMonitor",
    "Sampling",
    "TrainingHistory",
    "evaluation_mode",
    "last_linear",
    "load_digits",
    "load_fashion_mnist",
    "predict",
    "select_batch",
    "straggler_stability",
    "train",
]
