"""Training with margins: select the batch from candidates, and real data to try it on."""

from .data import ClassificationData, DataError, load_digits, load_fashion_mnist
from .loop import Sampling, TrainingHistory, predict, train
from .selection import evaluation_mode, last_linear, select_batch

__all__ = [
    "ClassificationData",
    "DataError",
    "Sampling",
    "TrainingHistory",
    "evaluation_mode",
    "last_linear",
    "load_digits",
    "load_fashion_mnist",
    "predict",
    "select_batch",
    "train",
]
