"""What ``marginops score`` computes of each row and keeps of all rows, from its options."""

from __future__ import annotations

import argparse

from ...scoring import (
    Margins,
    Moments,
    Reduction,
    Scorer,
    Smallest,
    SmallestPerClass,
    SuspiciousLabels,
)
from ...scoring.names import NEED_HEAD, NEED_TARGET, SCORES, STATISTICS
from ..options import UsageError


def make_scorer(options: argparse.Namespace) -> Scorer:
    """The scorer of the rows."""
    names = options.statistics
    if names == ["all"]:
        names = [name for name in STATISTICS if _can_compute(name, options)]
    return Scorer(
        options.head,
        layer=options.layer,
        model=options.model,
        column=options.column,
        target=options.target,
        id=options.id,
        statistics=names,
        device=options.device,
        batch_rows=options.batch_rows,
    )


def make_reductions(options: argparse.Namespace, scorer: Scorer) -> list[Reduction]:
    """What is kept of all rows. The distribution of a score always is."""
    by, largest = options.by, options.largest
    if by in STATISTICS and not _can_compute(by, options):
        needed = "--target" if by in NEED_TARGET and options.target is None else "--head"
        raise UsageError(
            f"--by: expected {needed} with {by}, got none; add {needed}, or select by another "
            "statistic"
        )
    kept: list[Reduction] = []
    if options.select is not None:
        kept.append(Smallest(options.select, by, largest))
    if options.select_per_class is not None:
        kept.append(SmallestPerClass(options.select_per_class, by, largest))
    if options.label_issues is not None:
        kept.append(SuspiciousLabels(options.label_issues))
    if options.class_moments:
        kept.append(Moments())
    scores = [name for name in (by, *scorer.statistics) if name in SCORES]
    return [*kept, Margins(scores[0] if scores else None)]


def _can_compute(name: str, options: argparse.Namespace) -> bool:
    has_target, has_head = options.target is not None, options.head is not None
    return (has_target or name not in NEED_TARGET) and (has_head or name not in NEED_HEAD)
