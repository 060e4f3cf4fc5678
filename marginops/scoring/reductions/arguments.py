"""Arguments that several reductions have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import _checks as checks
from ..scored import ScoredBatch
from ..statistics import SCORES


def check_selection(k: Any, by: Any, largest: Any) -> None:
    """Check the arguments of a selection of k rows."""
    checks.check_int("k", k, 1)
    check_by(by, SCORES)
    if not isinstance(largest, bool):
        raise TypeError(f"largest: expected a bool, got {type(largest).__name__}")


def check_by(by: Any, choices: Sequence[str]) -> None:
    """Check the name of a statistic, or None."""
    if by is None:
        return
    if not isinstance(by, str):
        raise TypeError(f"by: expected the name of a statistic or None, got {type(by).__name__}")
    checks.check_choice("by", by, choices)


def values_of(scored: ScoredBatch, name: str | None) -> Tensor:
    """The values of a statistic in a batch."""
    if name is None:
        raise ValueError("by: expected the name of a statistic, got None; call resolved() first")
    if name not in scored.values:
        known = ", ".join(scored.values) or "none"
        raise ValueError(
            f"scored: expected the statistic {name}, got {known}; "
            "make the scorer with its with_statistics()"
        )
    return scored.values[name].detach()


def target_of(scored: ScoredBatch) -> Tensor:
    """The labels of a batch."""
    if scored.target is None:
        raise ValueError("scored: expected labels, got none; name their column as target")
    return scored.target
