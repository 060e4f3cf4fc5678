"""Quasi-homogeneous networks: rates of the parameters, and the scale that they define."""

from .assignment import rates
from .equations import NotQuasiHomogeneousError
from .scale import lambda_seminorm, log_scale, rescale

__all__ = [
    "NotQuasiHomogeneousError",
    "lambda_seminorm",
    "log_scale",
    "rates",
    "rescale",
]
