"""The arguments of the ops of a linear head, and the place of its classes.

The op ``linear_<name>`` computes what the op ``<name>`` computes from
``F.linear(input, weight, bias)``. PyTorch's matrix product writes the logits of a tile of rows and
classes into a buffer, and the op reads them there. Margins and scores need no logits for their
gradient, which follows from the difference of two rows of the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import margin_pair as pairs
from . import row_sums
from .arguments import checked_target
from .class_sum import ScaledRows, sum_pairs
from .row_sums import RowSums, StatisticsFields
from .select import select_smallest_op
from .tiles import logit_tiles, tile_shape

Tensors = tuple[Tensor, ...]


class Place:
    """Where the classes of a head are: all in this process.

    For classes in several processes :class:`shard.Shard` overrides the methods. Every process gets
    the same results.
    """

    def labels(self, head: LinearHead) -> tuple[Tensor, Tensor]:
        """Which rows are ignored, and the targets with class 0 for ignored rows.

        Raises:
            RuntimeError: A target is no class.
        """
        return checked_target(head.target, len(head.weight), head.ignore_index)

    def row_sums(self, head: LinearHead, label: Tensor, with_sums: bool) -> RowSums:
        """The :class:`RowSums` of whole rows of logits."""
        return head.local_sums(label, with_sums)

    def pair_distance(self, weight: Tensor, bias: Tensor | None, pair: Tensor) -> Tensor:
        """The result of ``pair_distance_op`` for the weight of all classes."""
        distance: Tensor = pairs.pair_distance_op(weight, bias, pair)
        return distance

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The rows of the weight (or entries of the bias) of these classes."""
        return weight[classes]

    def local(self, classes: Tensor) -> Tensor:
        """The classes, numbered within this process; NOT_IN_PIECE for those of other processes."""
        return classes

    def sum_pairs(
        self, pair: Tensor, count: int, scaled_rows: Sequence[ScaledRows]
    ) -> list[Tensor]:
        """See :func:`class_sum.sum_pairs`; for the ``count`` classes of this process."""
        return sum_pairs(pair, count, scaled_rows)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of what each process computes from its own classes."""
        return value


ONE_PROCESS = Place()


class LinearHead(NamedTuple):
    """The arguments of an op of a linear head, checked and converted.

    Attributes:
        input: ``[N, D]``.
        weight: ``[C, D]``, the classes of this process.
        bias: ``[C]``, or None.
        target: ``[N]``, numbered over the classes of all processes; None without labels.
        log_norm: 0-d, or None.
        k: How many of the smallest values an op selects; None for the values of all rows.
        ignore_index: The target of ignored rows.
        bias_in_norm: Whether the bias counts as one more column of the weight in the norm.
        nearest: Whether a score is that of the nearest boundary. Its tiles hold whole rows.
        dtype: The dtype of the matrix product under autocast; None for that of the arguments.
        chunk_bytes: The size of the buffer for logits; None for the default.
        place: Where the classes are.
        shape: The shape of the rows in the features that the caller passed.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    target: Any = None
    log_norm: Tensor | None = None
    k: int | None = None
    ignore_index: int = -100
    bias_in_norm: bool = False
    nearest: bool = False
    dtype: torch.dtype | None = None
    chunk_bytes: int | None = None
    place: Place = ONE_PROCESS
    shape: torch.Size = torch.Size()

    @property
    def ignored(self) -> Tensor:
        """``[N]`` bool, true for the rows whose target is ``ignore_index``."""
        return self.target == self.ignore_index

    def tile_shape(self) -> tuple[int, int]:
        """The number of rows and of classes of a tile."""
        return tile_shape(self.input, self.weight, self.dtype, self.chunk_bytes, self.nearest)

    def tiles(self, shape: tuple[int, int]) -> Iterator[tuple[slice, slice, Tensor]]:
        """The logits of this process, see :func:`tiles.logit_tiles`."""
        return logit_tiles(self.input, self.weight, self.bias, self.dtype, shape)

    def tiles_of_whole_rows(self) -> Iterator[tuple[slice, slice, Tensor]] | None:
        """The tiles if each holds the logits of all classes, else None."""
        shape = self.tile_shape()
        has_all = self.place is ONE_PROCESS and shape[1] >= self.weight.shape[0]
        return self.tiles(shape) if has_all else None

    def local_sums(self, label: Tensor, with_sums: bool) -> RowSums:
        """The :class:`RowSums` over the classes of this process, from the logits of the tiles.

        Margins and scores only need the largest logits. They pass ``with_sums=False``.
        """
        complete, parts = [], []
        for rows, classes, logits in self.tiles(self.tile_shape()):
            parts.append(row_sums.piece_sums(logits, label[rows], classes, with_sums))
            if classes.stop == len(self.weight):
                complete.append(row_sums.merge(parts))
                parts = []
        return RowSums(*join(complete))

    def statistics(self, input_norm: Tensor | None) -> StatisticsFields:
        """The fields of ``sample_statistics_op``. Without ``input_norm`` only margin and rival."""
        ignored, label = self.place.labels(self)
        sums = self.place.row_sums(self, label, input_norm is not None)
        return row_sums.finish_exactly(sums, label, ignored, input_norm, self.log_norm)

    def norm_parameters(self) -> tuple[Tensor, Tensor | None]:
        """The weight and bias whose distances a score is divided by; no bias if it does not count.

        They are float32 under autocast, where the dtypes of weight and bias may differ.
        """
        bias = self.bias if self.bias_in_norm else None
        if self.dtype is None:
            return self.weight, bias
        return self.weight.float(), None if bias is None else bias.float()

    def smallest(self, values: Tensor, *others: Tensor) -> Tensors:
        """The values, indices and ``others`` of the k smallest values.

        Without ``k`` all values, no indices, and all ``others``.
        """
        if self.k is None:
            return values, values.new_empty(0, dtype=torch.int64), *others
        values, indices = select_smallest_op(values, self.k)
        return values, indices, *(other[indices] for other in others)

    def chosen(self, indices: Tensor) -> LinearHead:
        """The head with these rows only."""
        target = None if self.target is None else self.target[indices]
        return self._replace(input=self.input[indices], target=target)

    def in_shape(self, values: Tensor) -> Tensor:
        """The values of all rows in the shape of the rows that the caller passed."""
        return values if len(self.shape) == 1 else values.view(self.shape)


def join(parts: Sequence[Tensors]) -> Tensors:
    """Concatenate the results of all ranges of rows."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
