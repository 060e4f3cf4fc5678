"""Smallest: the k rows with the smallest scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from ..scored import ScoredBatch
from .arguments import check_selection, values_of
from .base import Reduction
from .candidates import Candidates, candidate_rows
from .states import json_number, pack, unpack


class Smallest(Reduction):
    """The k rows with the smallest scores, in a fixed order.

    The order is by score, ascending, with ``+inf`` before NaN. Among equal scores the row with the
    smallest id comes first: integers by value, strings by their UTF-8 bytes. Rows with equal ids
    or without ids follow by their number. So the result depends on the rows alone: not on batches,
    tasks or workers.

    The result is a table with a line for each selected row, the first one first: ``id`` if there
    are ids (int64, uint64 or string), ``row`` (int64, the number of the row in all files), the
    score under the name of the statistic, and ``target`` and ``prediction`` where they are known.

    The object holds at most about 2 k rows and a batch. Most batches are compared with the k-th
    score so far, and cost O(B). The rows are only sorted for the result.

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

    def __init__(self, k: int, by: str | None = None, largest: bool = False) -> None:
        check_selection(k, by, largest)
        self.k, self.by, self.largest = k, by, largest
        self._candidates = Candidates(k, str(by), largest)
        self._num_rows = 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic of the scores."""
        return () if self.by is None else (self.by,)

    def resolved(self, default: str, *, has_target: bool = False) -> Smallest:
        """An empty copy that selects by a default statistic where the user named none."""
        return type(self)(self.k, self.by or default, self.largest)

    def describe(self) -> dict[str, Any]:
        """The class and its arguments."""
        return {"class": type(self).__name__, "k": self.k, "by": self.by, "largest": self.largest}

    def update(self, scored: ScoredBatch) -> None:
        """Add a batch."""
        scores = values_of(scored, self.by)
        chosen = np.flatnonzero(self._candidates.may_select(scores.numpy()))
        columns = {"target": scored.target, "prediction": scored.values.get("prediction")}
        rows = candidate_rows(scored, chosen, {str(self.by): scores, **columns})
        self._candidates.add(rows)
        self._num_rows += len(scored)

    def state(self) -> pa.Table:
        """The selected rows, in the order of the files."""
        rows = self._candidates.rows()
        return pack(self, pa.table({}) if rows is None else rows, {"rows": self._num_rows})

    def merge(self, state: pa.Table) -> None:
        """Add a state."""
        numbers = unpack(self, state)
        if state.num_columns:
            rows = state.replace_schema_metadata(None)
            may_select = self._candidates.may_select(rows[self.by].to_numpy())
            self._candidates.add(rows.filter(pa.array(may_select)))
        self._num_rows += numbers["rows"]

    def result(self) -> pa.Table:
        """The selected rows, the first one first."""
        rows = self._candidates.ordered()
        if rows is None:
            rows = pa.table({"row": pa.array([], pa.int64()), self.by: pa.array([], pa.float32())})
        return rows

    def summary(self) -> dict[str, Any]:
        """The number of rows and of selected rows, and the scores of the first and the last."""
        scores = self.result()[self.by].to_numpy()
        return {
            "by": self.by,
            "largest": self.largest,
            "k": self.k,
            "rows": self._num_rows,
            "selected": len(scores),
            "first_score": json_number(scores[0]) if len(scores) else None,
            "last_score": json_number(scores[-1]) if len(scores) else None,
        }
