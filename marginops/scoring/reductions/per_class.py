"""SmallestPerClass: the k rows of each class with the smallest scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..scored import ScoredBatch
from .arguments import check_selection, values_of
from .base import Reduction
from .candidates import Candidates, candidate_rows
from .states import pack, unpack


class SmallestPerClass(Reduction):
    """The k rows with the smallest scores of each class, in a fixed order.

    The class of a row is its target. Rows without a label are left out. If the data have no labels
    at all, it is the class that the head predicts, and rows whose values or logits are not all
    finite are left out.

    Inside a class the order is that of :class:`marginops.scoring.Smallest`. The result is a table
    with the same columns, ordered by class: by ``target`` if there are labels, else by
    ``prediction``.

    The object holds at most about 2 k rows of each class and a batch.

    Args:
        k: The number of rows to select of each class, >= 1. All rows of a class are selected if it
            has fewer.
        by: The name of the statistic, see :class:`marginops.scoring.Smallest`.
        largest: Select the largest scores instead.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.

    Example:
        >>> from marginops.scoring import SmallestPerClass
        >>> SmallestPerClass(10, by="margin").statistics
        ('margin', 'prediction')
    """

    name = "selection_per_class"

    def __init__(self, k: int, by: str | None = None, largest: bool = False) -> None:
        check_selection(k, by, largest)
        self.k, self.by, self.largest = k, by, largest
        self._candidates = Candidates(k, str(by), largest)
        self._class = "target"
        self._num_classes = 0
        self._counts = {"rows": 0, "left_out": 0}

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic of the scores, and the prediction."""
        return ("prediction",) if self.by is None else (self.by, "prediction")

    def resolved(self, default: str, *, has_target: bool = False) -> SmallestPerClass:
        """An empty copy that selects by a default statistic where the user named none."""
        return type(self)(self.k, self.by or default, self.largest)

    def describe(self) -> dict[str, Any]:
        """The class and its arguments."""
        return {"class": type(self).__name__, "k": self.k, "by": self.by, "largest": self.largest}

    def update(self, scored: ScoredBatch) -> None:
        """Add a batch."""
        scores, prediction = values_of(scored, self.by), values_of(scored, "prediction")
        if scored.target is None:
            self._class, classes, has_class = "prediction", prediction, scored.is_finite
        else:
            classes, has_class = scored.target, scored.target != scored.ignore_index
        self._num_classes = scored.num_classes
        known = np.flatnonzero(has_class.numpy())
        may_select = self._candidates.may_select(scores.numpy()[known], classes.numpy()[known])
        columns = {str(self.by): scores, "target": scored.target, "prediction": prediction}
        rows = candidate_rows(scored, known[may_select], columns)
        self._candidates.add(rows, self._class, self._num_classes)
        self._counts["rows"] += len(scored)
        self._counts["left_out"] += len(scored) - len(known)

    def state(self) -> pa.Table:
        """The selected rows, in the order of the files."""
        rows = self._candidates.rows(self._class, self._num_classes)
        numbers = {**self._counts, "class": self._class, "num_classes": self._num_classes}
        return pack(self, pa.table({}) if rows is None else rows, numbers)

    def merge(self, state: pa.Table) -> None:
        """Add a state."""
        numbers = unpack(self, state)
        if state.num_columns:
            self._class, self._num_classes = numbers["class"], numbers["num_classes"]
            rows = state.replace_schema_metadata(None)
            scores, classes = rows[self.by].to_numpy(), rows[self._class].to_numpy()
            may_select = self._candidates.may_select(scores, classes)
            rows = rows.filter(pa.array(may_select))
            self._candidates.add(rows, self._class, self._num_classes)
        for name in self._counts:
            self._counts[name] += numbers[name]

    def result(self) -> pa.Table:
        """The selected rows, class by class, the first one first."""
        rows = self._candidates.ordered(self._class, self._num_classes)
        if rows is None:
            integers, floats = pa.array([], pa.int64()), pa.array([], pa.float32())
            rows = pa.table({"row": integers, self.by: floats, self._class: integers})
        return rows

    def summary(self) -> dict[str, Any]:
        """The number of rows, of rows without a class, and of selected rows of each class."""
        classes: npt.NDArray[np.int64] = self.result()[self._class].to_numpy()
        return {
            "by": self.by,
            "largest": self.largest,
            "k": self.k,
            "class": self._class,
            **self._counts,
            "selected": len(classes),
            "selected_per_class": np.bincount(classes, minlength=self._num_classes).tolist(),
        }
