"""Norms of whole models. Margins divided by them can be compared between networks."""

from .bound import spectrally_normalized_margin
from .product import log_norm_product

__all__ = ["log_norm_product", "spectrally_normalized_margin"]
