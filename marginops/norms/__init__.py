"""Norms of whole models. Margins divided by them can be compared between networks."""

from .complexity import log_spectral_complexity
from .product import log_norm_product

__all__ = ["log_norm_product", "log_spectral_complexity"]
