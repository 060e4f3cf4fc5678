"""SuspiciousLabels: the rows that contradict their labels most, and which classes are confused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ... import _checks as checks
from ..scored import ScoredBatch
from .arguments import target_of, values_of
from .base import Reduction
from .candidates import Candidates, candidate_rows
from .states import json_number, pack, unpack

_MOST_CONFUSED = 20
_Integers = npt.NDArray[np.int64]


class SuspiciousLabels(Reduction):
    r"""The k rows whose margins contradict their labels most, and the counts of confused classes.

    The margin of a row with label y and logits f is :math:`f_y - \max_{c \ne y} f_c`. It is
    negative where the head prefers another class, the rival, and the more so the surer the head is.
    Pleiss et al. (2020) rank labels by the average of these margins over a training. Here the head
    is trained already, and reads each row once. So a label that the head has learned by heart does
    not stand out: score rows that were not trained on, as in cross-validation.

    Rows without a label, and those whose values or logits are not all finite, are left out.

    The result is a table with a line for each of at most k rows, the most negative margin first;
    ties follow the order of :class:`marginops.scoring.Smallest`. Its columns are ``id`` if there
    are ids, ``row``, ``margin``, ``target`` (the label) and ``suggested`` (the class that the head
    prefers). All rows are misclassified ones.

    The summary holds the number of rows, of those left out and of misclassified ones, the share of
    misclassified rows (``error_rate``, and ``error_rate_per_class``, None for a class without
    rows), and the 20 pairs of label and prediction that occur most often.

    The object holds at most about 2 k rows, a batch, the C counts of labels, and the counts of the
    pairs that occur.

    Args:
        k: The number of rows to keep, >= 1.

    Raises:
        TypeError, ValueError: ``k`` has the wrong type or value.

    Example:
        >>> from marginops.scoring import SuspiciousLabels
        >>> SuspiciousLabels(1000).statistics
        ('margin', 'rival', 'correct')
    """

    name = "label_issues"
    needs_target = True

    def __init__(self, k: int) -> None:
        checks.check_int("k", k, 1)
        self.k = k
        self._candidates = Candidates(k, "margin")
        self._labels: _Integers = np.zeros(0, dtype=np.int64)  # rows of each label
        # Misclassified rows by label * C + prediction.
        self._pairs: _Integers = np.zeros(0, dtype=np.int64)
        self._pair_counts: _Integers = np.zeros(0, dtype=np.int64)
        self._counts = {"rows": 0, "left_out": 0}

    @property
    def statistics(self) -> tuple[str, ...]:
        """Margin, rival and correctness."""
        return ("margin", "rival", "correct")

    def describe(self) -> dict[str, Any]:
        """The class and its argument."""
        return {"class": type(self).__name__, "k": self.k}

    def update(self, scored: ScoredBatch) -> None:
        """Add a batch."""
        margin, rival, correct = (values_of(scored, name) for name in self.statistics)
        target = target_of(scored)
        is_counted = scored.is_finite & (target != scored.ignore_index)
        labels = target[is_counted].numpy()
        wrong = np.flatnonzero((is_counted & ~correct).numpy())
        self._count_labels(np.bincount(labels, minlength=scored.num_classes))
        # The largest logit of a misclassified row is that of the rival.
        pairs = target.numpy()[wrong] * scored.num_classes + rival.numpy()[wrong]
        self._count_pairs(*np.unique(pairs, return_counts=True))
        chosen = wrong[self._candidates.may_select(margin.numpy()[wrong])]
        columns = {"margin": margin, "target": target, "suggested": rival}
        self._candidates.add(candidate_rows(scored, chosen, columns))
        self._counts["rows"] += len(scored)
        self._counts["left_out"] += len(scored) - len(labels)

    def state(self) -> pa.Table:
        """The rows, then the counts of the pairs: lines that have a ``count`` and no ``row``."""
        rows = self._candidates.rows()
        numbers = {**self._counts, "labels": self._labels.tolist()}
        if rows is None:
            return pack(self, pa.table({}), numbers)
        num_classes = max(len(self._labels), 1)
        pairs = pa.table(
            {
                "target": self._pairs // num_classes,
                "suggested": self._pairs % num_classes,
                "count": self._pair_counts,
            }
        )
        table = pa.concat_tables([rows, pairs], promote_options="default")
        return pack(self, table, numbers)

    def merge(self, state: pa.Table) -> None:
        """Add a state."""
        numbers = unpack(self, state)
        self._count_labels(np.array(numbers["labels"], dtype=np.int64))
        if state.num_columns:
            state = state.replace_schema_metadata(None)
            is_row = state["row"].is_valid()
            rows = state.filter(is_row).drop_columns("count")
            self._candidates.add_state(rows)
            label, prediction, count = (
                state.filter(state["count"].is_valid())[name].to_numpy()
                for name in ("target", "suggested", "count")
            )
            self._count_pairs(label * len(self._labels) + prediction, count)
        for name in self._counts:
            self._counts[name] += numbers[name]

    def result(self) -> pa.Table:
        """The rows, the most suspicious first."""
        rows = self._candidates.ordered()
        if rows is None:
            integers, floats = pa.array([], pa.int64()), pa.array([], pa.float32())
            columns = {"row": integers, "margin": floats, "target": integers}
            rows = pa.table({**columns, "suggested": integers})
        return rows

    def summary(self) -> dict[str, Any]:
        """The numbers of rows, the error rates, and the most confused classes."""
        num_classes = max(len(self._labels), 1)
        labels, predictions = self._pairs // num_classes, self._pairs % num_classes
        counted, wrong = int(self._labels.sum()), int(self._pair_counts.sum())
        errors = np.bincount(labels, self._pair_counts, len(self._labels))
        with np.errstate(invalid="ignore"):
            rates = (errors / self._labels).tolist()
        # The pairs are in ascending order, so that the order of equal counts is fixed.
        most = np.argsort(-self._pair_counts, kind="stable")[:_MOST_CONFUSED]
        return {
            "k": self.k,
            **self._counts,
            "misclassified": wrong,
            "error_rate": wrong / counted if counted else None,
            "error_rate_per_class": [json_number(rate) for rate in rates],
            "most_confused": [
                {
                    "label": int(labels[pair]),
                    "prediction": int(predictions[pair]),
                    "count": int(self._pair_counts[pair]),
                }
                for pair in most
            ],
        }

    def _count_labels(self, counts: _Integers) -> None:
        if not len(self._labels):
            self._labels = counts
        elif len(counts):  # the state of no rows has none
            self._labels = self._labels + counts

    def _count_pairs(self, pairs: _Integers, counts: _Integers) -> None:
        """Add the counts of pairs, which are in ascending order, as the object's own are."""
        if not len(pairs):
            return
        pairs = np.concatenate((self._pairs, pairs))
        order = np.argsort(pairs, kind="stable")  # merges what is in order already
        pairs, counts = pairs[order], np.concatenate((self._pair_counts, counts))[order]
        first = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1]))
        self._pairs, self._pair_counts = pairs[first], np.add.reduceat(counts, first)
