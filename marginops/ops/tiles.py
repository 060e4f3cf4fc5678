"""Computes the logits of a linear head tile by tile, in one buffer.

A tile is a range of rows and a range of classes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MEBIBYTE = 1 << 20
# On the CPU, 8 MiB measured slower and 32 MiB no faster. The size for CUDA is not measured yet.
CPU_CHUNK_BYTES = 16 * MEBIBYTE
CUDA_CHUNK_BYTES = 128 * MEBIBYTE
# A product of few rows spends as much time on reading the weight as on multiplying. If the buffer
# has room for _ENOUGH_ROWS rows of all classes, tiles hold all classes. Otherwise tiles have
# _TILE_ROWS rows and as many classes as the buffer has room for.
_ENOUGH_ROWS = 1024
_TILE_ROWS = 2048


def default_chunk_bytes(input: Tensor) -> int:
    """The size of the buffer in bytes, on the device of the features."""
    return CUDA_CHUNK_BYTES if input.is_cuda else CPU_CHUNK_BYTES


def row_bytes(weight: Tensor, dtype: torch.dtype | None) -> int | torch.SymInt:
    """The size of one row of logits in bytes."""
    return weight.shape[0] * (dtype or weight.dtype).itemsize


def check_chunk_bytes(chunk_bytes: Any, weight: Tensor, dtype: torch.dtype | None) -> None:
    """Check that ``chunk_bytes`` is None or has room for one row of logits."""
    if chunk_bytes is None:
        return
    if not isinstance(chunk_bytes, int) or isinstance(chunk_bytes, bool):
        raise TypeError(f"chunk_bytes: expected an int or None, got {type(chunk_bytes).__name__}")
    least = row_bytes(weight, dtype)
    if chunk_bytes < least:
        raise ValueError(
            f"chunk_bytes: expected at least {least}, one row of {weight.shape[0]} logits, "
            f"got {chunk_bytes}"
        )


def check_rows(rows: Tensor, **values: Tensor | None) -> None:
    """Check that there is one value for each row. Direct calls of the ops skip other checks."""
    for name, value in values.items():
        if value is not None and value.shape != rows.shape[:1]:
            raise RuntimeError(
                f"{name}: expected shape {list(rows.shape[:1])}, got {list(value.shape)}"
            )


def tile_shape(
    input: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
    whole_rows: bool = False,
) -> tuple[int, int]:
    """The number of rows and of classes of a tile.

    The products read the features once for each range of classes, and the weight once for each
    range of rows. So a tile does not hold few rows of all classes, but more rows of fewer classes,
    unless ``whole_rows`` asks for tiles with all classes.
    """
    item_bytes = (dtype or weight.dtype).itemsize
    capacity = max((chunk_bytes or default_chunk_bytes(input)) // item_bytes, 1)
    count, classes = input.shape[0], weight.shape[0]
    rows = min(count, max(capacity // max(classes, 1), 1))
    columns = classes
    if not whole_rows and rows < min(count, _ENOUGH_ROWS):
        rows = min(count, _TILE_ROWS, capacity)
        columns = capacity // rows
        columns -= columns % 64 if columns > 64 else 0
    blocks = -(-count // max(rows, 1))  # blocks of rows of nearly equal size
    return -(-count // max(blocks, 1)), min(columns, classes)


def logit_tiles(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    shape: tuple[int, int],
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, classes and logits ``F.linear(input, weight, bias)`` of each tile.

    The logits are valid until the next tile. The product is computed in ``dtype``, or in the
    dtype of the arguments if ``dtype`` is None. All tiles of a range of rows follow each other. An
    input without rows has one empty tile.
    """
    check_rows(weight, bias=bias)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    buffer = weight.new_empty(shape[0] * shape[1])
    for rows in pieces(input.shape[0], shape[0]):
        features = _part(input, rows).to(weight.dtype)
        for classes in pieces(weight.shape[0], shape[1]):
            size = features.shape[0], classes.stop - classes.start
            logits = buffer[: size[0] * size[1]].view(size)
            columns = _part(weight, classes).t()
            if bias is None:
                torch.mm(features, columns, out=logits)
            else:
                torch.addmm(_part(bias, classes), features, columns, out=logits)
            yield rows, classes, logits


def _part(rows: Tensor, piece: slice) -> Tensor:
    """A range of rows. A slice of all of them would take as long as a small product."""
    return rows if piece.stop - piece.start == rows.shape[0] else rows[piece]


def pieces(count: int, size: int) -> Iterator[slice]:
    """Split ``range(count)`` into pieces of at most ``size``; a count of 0 into one empty piece."""
    for start in range(0, max(count, 1), max(size, 1)):
        yield slice(start, min(start + size, count))
