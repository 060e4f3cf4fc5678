"""Modules around the ops."""

from .regularization import MultiMarginRegularization

__all__ = ["MultiMarginRegularization"]
