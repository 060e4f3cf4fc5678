"""What a state of neural collapse cannot be."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def collapse_fault(state: Mapping[str, Any]) -> str | None:
    """What is impossible about a state, "expected ..., got ...", or None."""
    count, mean = state["count"], state["mean"]
    if (count < 0).any():
        return f"expected count >= 0, got {count.min().item()}"
    if mean[count == 0].ne(0).any():
        return "expected 0 as mean of classes without samples, got other values"
    if mean.isinf().any():
        return "expected no infinity in mean, got one"
    if not state["has_weight"] and not state["weight"].isnan().all():
        return "expected a weight of NaN with has_weight=False, got numbers"
    within = state.get("within_scatter")
    return (None if within is None else _within_fault(count, mean, within)) or _pass_fault(state)


def _within_fault(count: Tensor, mean: Tensor, within: Tensor) -> str | None:
    spread = within.diagonal().sqrt()
    if within.isinf().any():
        return "expected no infinity in within_scatter, got one"
    if (within.diagonal() < 0).any():
        return "expected a diagonal of within_scatter >= 0, got a negative value"
    if (spread.isnan() != mean.isnan().any(0)).any():
        return "expected NaN in the columns of within_scatter where a mean is NaN, got others"
    if (within.abs() > torch.outer(spread, spread) * (1 + 1e-6)).any():
        return (
            "expected within_scatter as a sum of outer products, got larger values off the diagonal"
        )
    if not count.any() and within.ne(0).any():
        return "expected 0 as within_scatter without samples, got other values"
    return None


def _pass_fault(state: Mapping[str, Any]) -> str | None:
    compared, differing = state["compared"].item(), state["differing"].item()
    if compared < 0:
        return f"expected compared >= 0, got {compared}"
    if not math.isnan(differing) and not (differing.is_integer() and 0 <= differing <= compared):
        return f"expected differing as a whole number from 0 to {compared}, got {differing}"
    ratio = state["ratio"].item() if "ratio" in state else 0.0
    if ratio < 0 or (ratio > 0 and compared == 0):
        return f"expected ratio >= 0, and 0 without compared samples, got {ratio}"
    return None
