"""Smallest: the k rows with the smallest scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..scored import ScoredBatch
from ..statistics import NEED_TARGET
from .arguments import target_of
from .candidates import Array
from .selection import RowSelection
from .states import json_number


class Smallest(RowSelection):
    """The k rows with the smallest scores, in a fixed order.

    The order is by score, ascending, with ``+inf`` before NaN. Among equal scores the row with the
    smallest id comes first: integers by value, strings by their UTF-8 bytes. Rows with equal ids
    or without ids follow by their number. So the result depends on the rows alone: not on batches,
    tasks or workers. Rows without a label are left out if the score needs one.

    The result is a table with a line for each selected row, the first one first: ``id`` if there
    are ids (int64, uint64 or string), ``row`` (int64, the number of the row in all files), the
    score under the name of the statistic, and ``target`` and ``prediction`` where they are known.

    The object holds at most about 2 k rows and a batch. It compares each batch with the k-th score
    so far, which costs O(B), and keeps what comes before. The rows are sorted for the result alone.
    The state of a task takes about 36 bytes for each row that it selects.

    Args:
        k: The number of rows to select, >= 1. All rows are selected if there are fewer.
        by: The name of the statistic, one of ``margin``, ``top2_margin``, ``loss``,
            ``confidence``, ``entropy``, ``el2n``, ``gradient_norm``, ``minimal_margin`` and
            ``probability_margin``. By default the first statistic of the scorer.
        largest: Select the largest scores instead, in descending order. NaN still comes last, and
            among equal scores the smallest id still comes first.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.

    Example:
        >>> from marginops.scoring import Smallest
        >>> Smallest(1000, by="margin").describe()
        {'class': 'Smallest', 'k': 1000, 'by': 'margin', 'largest': False}
    """

    name = "selection"

    def _eligible(self, scored: ScoredBatch) -> tuple[Array, Array | None]:
        """Rows without a label have no score that needs one."""
        if self.by not in NEED_TARGET:
            return np.ones(len(scored), dtype=bool), None
        return (target_of(scored) != scored.ignore_index).numpy(), None

    def summary(self) -> dict[str, Any]:
        """The numbers of rows, and the scores of the first and the last selected one."""
        scores = self.result()[self.by].to_numpy()
        first, last = (json_number(scores[place]) if len(scores) else None for place in (0, -1))
        return {**super().summary(), "first_score": first, "last_score": last}
