"""Sums over the samples of each class in a fixed order, for gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import result_dtype
from ._batches import Batch
from ._library import Op

# Values [K], and the rows [K, D] that they multiply.
ScaledRows = tuple[Tensor, Tensor]


def add_in_order(sums: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values`` to the rows ``index`` of ``sums``, in the same order in every run."""
    if sums.is_cuda:
        sums.index_put_((index,), values, accumulate=True)
    else:
        sums.index_add_(0, index, values)


class ClassSumOp(Op):
    """The sum of ``coefficient * row`` for each class.

    ``key`` is ``class * number of rows + row``, in ascending order.
    """

    schema = "class_sum(Tensor key, Tensor coefficient, Tensor rows, SymInt classes) -> Tensor"

    def call_batch(self, batch: Batch) -> Tensor:
        """Number the classes and the rows of all elements of the batch."""
        key, _, rows, classes = batch.values.values()
        count = rows.shape[-2]
        index, row = key // max(count, 1), key % max(count, 1)
        if "rows" in batch.names:
            row, rows = row + batch.offset(count, key), batch.joined("rows")
        key = (index + batch.offset(classes, key)) * max(len(rows), 1) + row
        sums = self(key.flatten(), batch.joined("coefficient"), rows, batch.size * classes)
        return batch.split(sums, classes)

    @staticmethod
    def reference(key: Tensor, coefficient: Tensor, rows: Tensor, classes: int) -> Tensor:
        sums = coefficient.new_zeros(classes, rows.shape[1])
        index = key // max(len(rows), 1)
        for part in torch.arange(len(key), device=key.device).split(4096):
            scaled = coefficient[part].unsqueeze(1) * rows[key[part] % len(rows)].to(sums.dtype)
            add_in_order(sums, index[part], scaled)
        return sums

    @staticmethod
    def fake(key: Tensor, coefficient: Tensor, rows: Tensor, classes: int) -> Tensor:
        return rows.new_empty((classes, rows.shape[1]), dtype=result_dtype(rows.dtype))


class_sum_op = ClassSumOp()


def sum_pairs(
    pair: Tensor, classes: int, scaled_rows: Sequence[ScaledRows], kept: Tensor | None = None
) -> list[Tensor]:
    """Add each scaled row to the first class of its pair, and subtract it from the second.

    The summands are sorted by class, so that one worker sums all of a class in a fixed order.

    Args:
        pair: ``[K, 2]``.
        classes: The number of classes C.
        scaled_rows: One or more values ``[K]`` and rows ``[K, D]``, each with a D of its own.
        kept: Indices of the summands that count, all if None. Those of the first classes are
            numbered 0 to K - 1, those of the second classes K to 2 K - 1.

    Returns:
        ``[C, D]`` for each of ``scaled_rows``.
    """
    count = pair.shape[0]
    index, sample = pair.t().flatten(), torch.arange(count, device=pair.device).repeat(2)
    if kept is not None:
        index, sample = index[kept], sample[kept]
    key, order = (index * count + sample).sort()
    if kept is not None:
        order = kept[order]
    return [
        class_sum_op(key, torch.cat((value, -value))[order], rows, classes)
        for value, rows in scaled_rows
    ]
