"""SmallestPerClass: the k rows of each class with the smallest scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..scored import ScoredBatch
from .arguments import values_of
from .candidates import Array
from .selection import RowSelection


class SmallestPerClass(RowSelection):
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

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic of the scores, and the prediction."""
        return (*super().statistics, "prediction")

    def _eligible(self, scored: ScoredBatch) -> tuple[Array, Array | None]:
        self._candidates.num_groups = scored.num_classes
        if scored.target is None:
            self._candidates.group = "prediction"
            classes, has_class = values_of(scored, "prediction"), scored.is_finite
        else:
            self._candidates.group = "target"
            classes, has_class = scored.target, scored.target != scored.ignore_index
        return has_class.numpy(), torch.where(has_class, classes, 0).numpy()

    def summary(self) -> dict[str, Any]:
        """The numbers of rows, of those without a class, and of selected rows of each class."""
        group, num_classes = self._candidates.group, self._candidates.num_groups
        classes = self.result()[group].to_numpy() if group else np.zeros(0, dtype=np.int64)
        selected = np.bincount(classes, minlength=num_classes if group else 0).tolist()
        return {**super().summary(), "class": group, "selected_per_class": selected}
