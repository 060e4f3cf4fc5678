"""Moments: the number, mean and radius of the rows of each class."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ...ops.moments import ClassMoments, class_moments
from ..scored import ScoredBatch
from .arguments import target_of
from .base import Reduction
from .states import json_number, pack, unpack


class Moments(Reduction):
    """The number, mean and gyration radius of the rows of each class.

    These are the :class:`marginops.ClassMoments` of the values of the column, features or logits,
    without rows that have no label or whose values or logits are not all finite.

    The result is a table with a line for each class: ``class`` (int64), ``count`` (int64), ``mean``
    (a list of D float64) and ``radius`` (float64). A class without rows has count 0, and NaN as
    mean and radius.

    All arithmetic is float64. Batches and tasks are merged in their order. Counts are exact. The
    object takes 8 C D bytes, and so does the state of a task in which all classes occur. Where that
    is much, choose larger tasks (``task_rows``). A batch costs one pass over its values, and a few
    more over the moments of the classes in it.

    Example:
        >>> from marginops.scoring import Moments
        >>> Moments().needs_features
        True
    """

    name = "moments"
    needs_target = True
    needs_features = True

    def __init__(self) -> None:
        self._moments: ClassMoments | None = None
        self._counts = {"rows": 0, "left_out": 0}

    @property
    def statistics(self) -> tuple[str, ...]:
        """None: it reads the values themselves."""
        return ()

    def describe(self) -> dict[str, Any]:
        """The class; there are no arguments."""
        return {"class": type(self).__name__}

    def update(self, scored: ScoredBatch) -> None:
        """Add a batch."""
        target = target_of(scored)
        if scored.features is None:
            raise ValueError("scored: expected features, got None; let the scorer keep them")
        num_classes, features = scored.num_classes, scored.features.detach()
        if self._moments is None:
            self._moments = _empty(num_classes, features.shape[1])
        is_counted = scored.is_finite & (target != scored.ignore_index)
        target = torch.where(is_counted, target, -1)
        # Tiles of 4 MiB in float64 stay in the cache. Tiles of few rows would mostly merge.
        num_rows = max(2**19 // features.shape[1], 4 * num_classes)
        for tile, label in zip(features.split(num_rows), target.split(num_rows), strict=True):
            occurs = torch.zeros(num_classes, dtype=torch.bool, device="cpu")
            occurs[label[label >= 0]] = True
            classes = occurs.nonzero().squeeze(1)
            dense = torch.where(label < 0, -1, (occurs.cumsum(0) - 1)[label])
            part = class_moments(tile.double(), dense, max(len(classes), 1), ignore_index=-1)
            self._merge(classes, ClassMoments._make(field[: len(classes)] for field in part))
        self._counts["rows"] += len(scored)
        self._counts["left_out"] += len(scored) - int(is_counted.sum())

    def state(self) -> pa.Table:
        """The moments of the classes that have rows."""
        if self._moments is None:
            return pack(self, pa.table({}), {**self._counts, "num_classes": 0})
        classes = self._moments.count.nonzero().squeeze(1)
        numbers = {**self._counts, "num_classes": len(self._moments.count)}
        return pack(self, _table(classes, self._moments), numbers)

    def merge(self, state: pa.Table) -> None:
        """Add a state."""
        numbers = unpack(self, state)
        if state.num_columns:
            num_features = state.schema.field("mean").type.list_size
            if self._moments is None:
                self._moments = _empty(numbers["num_classes"], num_features)
            classes, count, radius = (_tensor(state[name]) for name in ("class", "count", "radius"))
            mean = _tensor(pc.list_flatten(state["mean"])).reshape(-1, num_features)
            self._merge(classes, ClassMoments(count, mean, radius))
        for name in self._counts:
            self._counts[name] += numbers[name]

    def result(self) -> pa.Table:
        """One line for each class."""
        if self._moments is None:
            integers, floats = pa.array([], pa.int64()), pa.array([], pa.float64())
            lists = pa.array([], pa.list_(pa.float64()))
            return pa.table({"class": integers, "count": integers, "mean": lists, "radius": floats})
        return _table(torch.arange(len(self._moments.count), device="cpu"), self._moments)

    def summary(self) -> dict[str, Any]:
        """The number of rows, of classes without rows, and the mean radius of the others."""
        moments = self._moments or _empty(0, 0)
        occurs = moments.count > 0
        return {
            **self._counts,
            "classes": len(moments.count),
            "features": moments.mean.shape[1],
            "empty_classes": int((~occurs).sum()),
            "mean_radius": json_number(moments.radius[occurs].mean().item()),
        }

    def _merge(self, classes: Tensor, part: ClassMoments) -> None:
        """Merge moments of some classes, in place."""
        assert self._moments is not None
        own = ClassMoments._make(field[classes] for field in self._moments)
        for field, value in zip(self._moments, own.merge(part), strict=True):
            field[classes] = value


@torch.inference_mode(False)  # the tensors change later, in any mode
def _empty(num_classes: int, num_features: int) -> ClassMoments:
    with torch.device("cpu"):
        count = torch.zeros(num_classes, dtype=torch.int64)
        mean = torch.full((num_classes, num_features), torch.nan, dtype=torch.float64)
        return ClassMoments(count, mean, mean.new_full((num_classes,), torch.nan))


def _table(classes: Tensor, moments: ClassMoments) -> pa.Table:
    mean = moments.mean[classes]
    values = pa.array(mean.reshape(-1).numpy())
    return pa.table(
        {
            "class": classes.numpy(),
            "count": moments.count[classes].numpy(),
            "mean": pa.FixedSizeListArray.from_arrays(values, mean.shape[1]),
            "radius": moments.radius[classes].numpy(),
        }
    )


def _tensor(column: pa.ChunkedArray) -> Tensor:
    return torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False)))
