"""Modules that use the ops."""

from .regularization import MultiMarginRegularization

__all__ = ["MultiMarginRegularization"]
