"""Helpers that all ops of a linear head share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from . import row_sums
from .row_sums import RowSums
from .tiles import check_chunk_bytes, logit_tiles

Tensors = tuple[Tensor, ...]


def checked_linear(
    input: Any, weight: Any, bias: Any, chunk_bytes: Any, or_more: bool = False
) -> Any:
    """Check the arguments of a linear head. With ``or_more``, features are [..., N, D].

    Returns:
        The dtype of the matrix product under autocast. None stands for the dtype of the arguments.
    """
    dtype = checks.check_linear(input, weight, bias, or_more)
    checks.check_classes(weight)
    check_chunk_bytes(chunk_bytes, weight, dtype)
    return dtype


def as_matrix(input: Tensor) -> Tensor:
    """Features ``[..., D]`` as ``[N, D]``: a view, or a copy if there is no view.

    The matrix product takes much longer than such a copy.
    """
    return input if input.dim() == 2 else input.flatten(0, -2)


def in_shape(values: Tensor, shape: torch.Size) -> Tensor:
    """The values of all rows in the shape of the rows."""
    return values if len(shape) == 1 else values.view(shape)


def with_temperature(
    head: tuple[Tensor, Tensor, Tensor | None], temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A head whose logits are those of ``head`` divided by ``temperature``."""
    if temperature == 1:
        return head
    input, weight, bias = head
    # The features are the smallest factor of the logits.
    return input / temperature, weight, None if bias is None else bias / temperature


def head_sums(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    dtype: torch.dtype | None,
    shape: tuple[int, int],
    with_sums: bool,
) -> RowSums:
    """Compute the :class:`RowSums` of all rows from the logits of the tiles.

    Margins and scores only need the largest logits. They pass ``with_sums=False``.
    """
    complete, parts = [], []
    for rows, classes, logits in logit_tiles(input, weight, bias, dtype, shape):
        parts.append(row_sums.piece_sums(logits, label[rows], classes, with_sums))
        if classes.stop == len(weight):
            complete.append(row_sums.merge(parts))
            parts = []
    return RowSums(*join(complete))


def join(parts: Sequence[Tensors]) -> Tensors:
    """Concatenate the results of all ranges of rows."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def norm_parameters(
    weight: Tensor, bias: Tensor | None, bias_in_norm: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias whose distances a score is divided by; no bias if it does not count.

    They are float32 under autocast, where the dtypes of weight and bias may differ.
    """
    bias = bias if bias_in_norm else None
    if dtype is None:
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


def empty_results(input: Tensor, rows: int, *kinds: str) -> Tensors:
    """Uninitialized results: a "value" of the result dtype, an int64 "class" or int64 "pair"."""
    dtype = result_dtype(input.dtype)
    return tuple(
        input.new_empty(
            (rows, 2) if kind == "pair" else (rows,),
            dtype=dtype if kind == "value" else torch.int64,
        )
        for kind in kinds
    )
