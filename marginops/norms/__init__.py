"""Norms of whole models: what a margin is divided by before networks are compared."""

from .bound import spectrally_normalized_margin
from .product import log_norm_product

__all__ = ["log_norm_product", "spectrally_normalized_margin"]
