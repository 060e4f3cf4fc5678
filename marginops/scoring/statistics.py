"""The statistics of a tile of logits: what each needs, and the fewest ops that compute them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import margin_pair as pairs
from ..ops.linear_margin import linear_classification_margin
from ..ops.linear_score import linear_minimal_margin_score
from ..ops.linear_statistics import linear_sample_statistics
from ..ops.margin import classification_margin, minimal_margin_score
from ..ops.statistics import SampleStatistics, sample_statistics

# What a row without a label has: the values of a perfectly learnt sample, and no rival.
_UNLABELLED: dict[str, float | int | bool] = {
    "margin": torch.inf,
    "rival": 0,
    "loss": 0.0,
    "confidence": 1.0,
    "correct": True,
    "el2n": 0.0,
    "gradient_norm": 0.0,
}
NEED_TARGET = frozenset(_UNLABELLED)
NEED_HEAD = frozenset({"gradient_norm", "minimal_margin"})
STATISTICS = (
    *("margin", "rival", "top2_margin", "loss", "confidence", "entropy", "correct", "el2n"),
    *("gradient_norm", "prediction", "minimal_margin", "probability_margin"),
)
CLASSES = frozenset({"rival", "prediction"})
# Classes and truth values are no scores.
SCORES = tuple(name for name in STATISTICS if name not in CLASSES | {"correct"})
# Only the op for all statistics has these.
_OF_ALL = frozenset({"loss", "confidence", "entropy", "el2n", "gradient_norm"})
# These follow from the margin and its rival.
_OF_RIVAL = frozenset({"rival", "correct", "prediction"})


def default_statistics(has_target: bool, has_head: bool) -> tuple[str, ...]:
    """The score that ranks rows by default."""
    if has_target:
        return ("margin",)
    return ("minimal_margin",) if has_head else ("top2_margin",)


def checked_statistics(names: Any, has_target: bool, has_head: bool) -> tuple[str, ...]:
    """Check the names of statistics, and leave out those that come twice."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"statistics: expected a sequence of names, got {type(names).__name__}; pass "
            '("margin",) for one'
        )
    names = tuple(dict.fromkeys(names))
    if not names:
        raise ValueError("statistics: expected at least one name, got none")
    for name in names:
        if name not in STATISTICS:
            raise ValueError(
                f"statistics: expected names out of {', '.join(STATISTICS)}, got {name!r}"
            )
        if name in NEED_TARGET and not has_target:
            raise ValueError(
                f"statistics: expected target, the column of labels, for {name}, got None"
            )
        if name in NEED_HEAD and not has_head:
            raise ValueError(
                f"statistics: expected head for {name}, got None; the last layer's weight and "
                "input are needed"
            )
    return names


def result_type(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a statistic of logits of ``dtype``."""
    if name in CLASSES:
        return torch.int64
    return torch.bool if name == "correct" else dtype


def statistics_of_logits(
    wanted: Sequence[str],
    logits: Tensor,
    label: Tensor | None,
    features: Tensor | None,
    head: tuple[Tensor, Tensor | None] | None,
    log_norm: float | None,
) -> dict[str, Tensor]:
    """Compute statistics from logits ``[T, C]`` and labels ``[T]`` in [0, C)."""
    names = set(wanted)
    values: dict[str, Tensor] = {}
    target = logits.new_zeros(len(logits), dtype=torch.int64) if label is None else label
    # Of the small ops only that for the margin takes a norm.
    if names & _OF_ALL or (log_norm is not None and names & {"top2_margin", *_OF_RIVAL}):
        input = features if "gradient_norm" in names else None
        values = _fields(sample_statistics(logits, target, input=input, log_norm=log_norm), target)
    else:
        if names & _OF_RIVAL:
            margin, rival = pairs.classification_margin_rival_op(logits, target, None, None, -1)
            leads = (margin > 0) | ((margin == 0) & (target < rival))
            prediction = torch.where(leads, target, rival)
            values |= {"margin": margin, "rival": rival, "correct": leads, "prediction": prediction}
        elif "margin" in names:
            values["margin"] = classification_margin(logits, target, log_norm=log_norm)
        if "top2_margin" in names:
            values["top2_margin"] = minimal_margin_score(logits)
    if "minimal_margin" in names:
        assert head is not None
        values["minimal_margin"] = minimal_margin_score(logits, head[0])
    if "probability_margin" in names:
        values["probability_margin"] = minimal_margin_score(logits, softmax=True)
    return values


def statistics_of_features(
    wanted: Sequence[str],
    features: Tensor,
    label: Tensor | None,
    head: tuple[Tensor, Tensor | None],
    log_norm: float | None,
) -> dict[str, Tensor]:
    """Compute statistics from features ``[T, D]``, with no more than a part of the logits.

    Each kind of statistic computes the logits once more.
    """
    weight, bias = head
    names = set(wanted)
    values: dict[str, Tensor] = {}
    target = features.new_zeros(len(features), dtype=torch.int64) if label is None else label
    if names & (_OF_ALL | _OF_RIVAL | {"top2_margin", "probability_margin"}):
        fields = linear_sample_statistics(features, weight, target, bias, log_norm=log_norm)
        values = _fields(fields, target)
        if "probability_margin" in names:
            # p_i1 - p_i2 = p_i1 (1 - exp(f_i2 - f_i1)), with the first class as the label.
            first = linear_sample_statistics(features, weight, values["prediction"], bias)
            values["probability_margin"] = -first.confidence * torch.expm1(-first.top2_margin)
    elif "margin" in names:
        values["margin"] = linear_classification_margin(
            features, weight, target, bias, log_norm=log_norm
        )
    if "minimal_margin" in names:
        values["minimal_margin"] = linear_minimal_margin_score(features, weight, bias)
    return values


def _fields(statistics: SampleStatistics, target: Tensor) -> dict[str, Tensor]:
    fields = {name: value for name, value in statistics._asdict().items() if value is not None}
    fields["prediction"] = torch.where(statistics.correct, target, statistics.rival)
    return fields


def mark_unlabelled(values: dict[str, Tensor], unlabelled: Tensor) -> None:
    """Write what rows without a label have."""
    for name in values.keys() & NEED_TARGET:
        values[name].masked_fill_(unlabelled, _UNLABELLED[name])


def mark_not_finite(values: dict[str, Tensor], rows: Tensor) -> None:
    """Write what rows with values that are not finite have: NaN, class -1, not correct."""
    for name, value in values.items():
        value.masked_fill_(rows, -1 if name in CLASSES else 0 if name == "correct" else torch.nan)
