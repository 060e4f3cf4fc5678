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
from ...scoring.statistics import NEED_HEAD, NEED_TARGET, SCORES, STATISTICS
from ..options import UsageError


def make_scorer(options: argparse.Namespace) -> Scorer:
    """The scorer of the rows. Its head is loaded."""
    names = options.statistics
    if names == ["all"]:
        names = [name for name in STATISTICS if _missing(name, options) is None]
    for name in names or ():
        _check_computable("--statistics", name, options)
    scorer = Scorer(
        options.head,
        layer=options.layer,
        model=options.model,
        column=options.column,
        target=options.target,
        id=options.id,
        statistics=names,
        ignore_index=options.ignore_index,
        dtype=options.dtype,
        device=options.device,
        batch_rows=options.batch_rows,
    )
    if options.head is not None:
        # Errors of the head come before those of the files.
        _ = scorer.num_classes
    return scorer


def make_reductions(options: argparse.Namespace, scorer: Scorer) -> list[Reduction]:
    """What is kept of all rows. The distribution of a score always is."""
    by, largest = options.by, options.largest
    if by is not None:
        _check_computable("--by", by, options)
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


def _check_computable(option: str, name: str, options: argparse.Namespace) -> None:
    needed = _missing(name, options)
    if needed is not None:
        raise UsageError(
            f"{option}: expected {needed} with {name}, got none; add {needed}, or choose another "
            "statistic"
        )


def _missing(name: str, options: argparse.Namespace) -> str | None:
    """The option that a statistic needs and that is not given."""
    if name in NEED_TARGET and options.target is None:
        return "--target"
    return "--head" if name in NEED_HEAD and options.head is None else None
