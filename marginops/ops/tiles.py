"""The logits of a linear head, a tile of rows and classes at a time, in one buffer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MEBIBYTE = 1 << 20
# Measured on the CPU: 8 MiB are slower and 32 MiB no faster. On CUDA nothing is measured yet.
CPU_CHUNK_BYTES = 16 * MEBIBYTE
CUDA_CHUNK_BYTES = 128 * MEBIBYTE
# A product of few rows takes as long to read the weight as to multiply. From so many rows on,
# tiles hold all classes; else they have so many rows, and the classes that there is room for.
_ENOUGH_ROWS = 1024
_TILE_ROWS = 2048


def default_chunk_bytes(input: Tensor) -> int:
    """The size of the buffer on the device of the features."""
    return CUDA_CHUNK_BYTES if input.is_cuda else CPU_CHUNK_BYTES


def row_bytes(weight: Tensor, dtype: torch.dtype | None) -> int | torch.SymInt:
    """The bytes of one row of logits."""
    return weight.shape[0] * (dtype or weight.dtype).itemsize


def check_chunk_bytes(chunk_bytes: Any, weight: Tensor, dtype: torch.dtype | None) -> None:
    """None, or room for a row of logits."""
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


def tile_shape(
    input: Tensor,
    weight: Tensor,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
    whole_rows: bool = False,
) -> tuple[int, int]:
    """How many rows and classes of the logits to compute at once.

    A product reads its features once for each piece of the classes, and its weight once for each
    piece of the rows, so tiles are about square. ``whole_rows`` asks for all classes.
    """
    room = (chunk_bytes or default_chunk_bytes(input)) // (dtype or weight.dtype).itemsize
    count, classes = len(input), len(weight)
    rows = min(count, max(room // max(classes, 1), 1))
    columns = classes
    if not whole_rows and rows < min(count, _ENOUGH_ROWS):
        rows = min(count, _TILE_ROWS, room)
        columns = room // rows
        columns -= columns % 64 if columns > 64 else 0
    blocks = -(-count // max(rows, 1))  # of nearly equal size
    return -(-count // max(blocks, 1)), min(columns, classes)


def logit_tiles(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    shape: tuple[int, int],
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, classes, and their logits ``F.linear(input, weight, bias)``, valid until the next.

    The product is in ``dtype``, or that of the arguments. All classes of some rows come one after
    the other; for no rows at all there is one empty tile.
    """
    dtype = dtype or weight.dtype
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    buffer = weight.new_empty(shape[0] * shape[1])
    for rows in pieces(len(input), shape[0]):
        features = input[rows].to(dtype)
        for classes in pieces(len(weight), shape[1]):
            size = len(features), classes.stop - classes.start
            logits = buffer[: size[0] * size[1]].view(size)
            if bias is None:
                torch.mm(features, weight[classes].t(), out=logits)
            else:
                torch.addmm(bias[classes], features, weight[classes].t(), out=logits)
            yield rows, classes, logits


def pieces(count: int, size: int) -> Iterator[slice]:
    """``range(count)`` in pieces of a size; of nothing, one empty piece."""
    for start in range(0, max(count, 1), max(size, 1)):
        yield slice(start, min(start + size, count))
