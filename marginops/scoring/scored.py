"""The scores of one batch, which the reductions read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ScoredBatch:
    """The statistics of B consecutive rows, on the CPU.

    Attributes:
        first_row: The number of the first row, counted through all files of the run.
        values: Each statistic by its name, ``[B]``.
        ids: ``[B]``, integers or strings; None without an id column.
        target: ``[B]`` int64, with ``ignore_index`` for rows without a label; None without a
            column of labels.
        ignore_index: The target of rows without a label.
        features: ``[B, D]``, the values of the column, where a reduction needs them.
        num_classes: The number of classes C.
        is_finite: ``[B]`` bool, false for rows that ``counts`` calls missing, nan, infinite or
            overflow.
        counts: The number of rows by kind: ``"rows"``, all; ``"missing"``, those without values;
            ``"nan"``, with a NaN; ``"infinite"``, with an infinity and no NaN; ``"overflow"``, with
            finite values and logits that are not; ``"unlabelled"``, without a label.
    """

    first_row: int
    values: dict[str, Tensor]
    ids: pa.Array | None
    target: Tensor | None
    ignore_index: int
    features: Tensor | None
    num_classes: int
    is_finite: Tensor
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.is_finite)
