"""RowSelection: what the selections of k rows share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa

from ..scored import ScoredBatch
from .arguments import check_selection, values_of
from .base import Reduction
from .candidates import Array, Candidates, candidate_rows
from .states import pack, unpack


class RowSelection(Reduction):
    """A selection of the k rows that come first, of all rows or of each class."""

    def __init__(self, k: int, by: str | None = None, largest: bool = False) -> None:
        check_selection(k, by, largest)
        self.k, self.by, self.largest = k, by, largest
        self._candidates = Candidates(k, str(by), largest)
        self._counts = {"rows": 0, "left_out": 0}

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic of the scores."""
        return () if self.by is None else (self.by,)

    def resolved(self, default: str, *, has_target: bool = False) -> RowSelection:
        """An empty copy that selects by a default statistic where the user named none."""
        return type(self)(self.k, self.by or default, self.largest)

    def describe(self) -> dict[str, Any]:
        """The class and its arguments."""
        return {"class": type(self).__name__, "k": self.k, "by": self.by, "largest": self.largest}

    @abstractmethod
    def _eligible(self, scored: ScoredBatch) -> tuple[Array, Array | None]:
        """Which rows have a score and a class, ``[B]`` bool, and the classes, ``[B]`` int64."""

    def update(self, scored: ScoredBatch) -> None:
        """Add a batch."""
        scores = values_of(scored, self.by)
        is_eligible, classes = self._eligible(scored)
        may_select = is_eligible & self._candidates.may_select(scores.numpy(), classes)
        columns = {"target": scored.target, "prediction": scored.values.get("prediction")}
        columns = {str(self.by): scores, **columns}
        self._candidates.add(candidate_rows(scored, np.flatnonzero(may_select), columns))
        self._counts["rows"] += len(scored)
        self._counts["left_out"] += len(scored) - int(np.count_nonzero(is_eligible))

    def state(self) -> pa.Table:
        """The selected rows, in the order of the files."""
        rows = self._candidates.rows()
        groups = {"group": self._candidates.group, "num_groups": self._candidates.num_groups}
        return pack(self, pa.table({}) if rows is None else rows, {**self._counts, **groups})

    def merge(self, state: pa.Table) -> None:
        """Add a state."""
        numbers = unpack(self, state)
        if state.num_columns:
            self._candidates.group = numbers["group"]
            self._candidates.num_groups = numbers["num_groups"]
            self._candidates.add_state(state.replace_schema_metadata(None))
        for name in self._counts:
            self._counts[name] += numbers[name]

    def result(self) -> pa.Table:
        """The selected rows, class by class if there are classes, the first one first."""
        rows = self._candidates.ordered()
        if rows is None:
            integers, floats = pa.array([], pa.int64()), pa.array([], pa.float32())
            rows = pa.table({"row": integers, self.by: floats, "target": integers})
        return rows

    def summary(self) -> dict[str, Any]:
        """The arguments, and the numbers of rows, of rows left out and of selected rows."""
        selected = self.result().num_rows
        arguments = {"by": self.by, "largest": self.largest, "k": self.k}
        return {**arguments, **self._counts, "selected": selected}
