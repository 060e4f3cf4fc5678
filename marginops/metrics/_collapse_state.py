"""States of neural collapse: what they cannot be, and how their second passes merge."""

import math
from collections.abc import Mapping
from typing import Any

import torch


def collapse_fault(state: Mapping[str, Any]) -> str | None:
    """What is impossible about a state, "expected ..., got ...", or None."""
    count, mean, within = state["count"], state["mean"], state["within_scatter"]
    compared, differing = state["compared"].item(), state["differing"].item()
    empty, spread = count == 0, within.diagonal().sqrt()
    if (count < 0).any():
        return f"expected count >= 0, got {count.min().item()}"
    if mean[empty].ne(0).any():
        return "expected 0 as mean of classes without samples, got other values"
    if mean.isinf().any() or within.isinf().any():
        return "expected no infinity in mean and within_scatter, got one"
    if (within.diagonal() < 0).any():
        return "expected a diagonal of within_scatter >= 0, got a negative value"
    if (spread.isnan() != mean.isnan().any(0)).any():
        return "expected NaN in the columns of within_scatter where a mean is NaN, got others"
    if (within.abs() > torch.outer(spread, spread) * (1 + 1e-6)).any():
        return (
            "expected within_scatter as a sum of outer products, got larger values off the diagonal"
        )
    if empty.all() and within.ne(0).any():
        return "expected 0 as within_scatter without samples, got other values"
    if not state["has_weight"] and not state["weight"].isnan().all():
        return "expected a weight of NaN with has_weight=False, got numbers"
    if compared < 0:
        return f"expected compared >= 0, got {compared}"
    if not math.isnan(differing) and not (differing.is_integer() and 0 <= differing <= compared):
        return f"expected differing as a whole number from 0 to {compared}, got {differing}"
    return None


def second_pass(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The second pass over the samples of two states: both, that of one, or a new one."""
    names = ("centers", "has_centers", "compared", "differing")
    for own, other in ((earlier, later), (later, earlier)):
        if not other["has_centers"] and not other["count"].any():  # the means stay as they are
            return {name: own[name] for name in names}
    both = earlier["has_centers"] & later["has_centers"]
    same = both & torch.eq(earlier["centers"], later["centers"]).all()
    return {
        "centers": earlier["centers"],
        "has_centers": same,
        "compared": earlier["compared"] + later["compared"],
        "differing": earlier["differing"] + later["differing"],
    }
