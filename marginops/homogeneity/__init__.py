"""Quasi-homogeneous networks: rates of the parameters, the scale that they define, and margins."""

from .assignment import rates
from .scale import lambda_seminorm, log_scale, normalized_margin, rescale
from .system import NotQuasiHomogeneousError

__all__ = [
    "NotQuasiHomogeneousError",
    "lambda_seminorm",
    "log_scale",
    "normalized_margin",
    "rates",
    "rescale",
]
