"""The logits of a linear head, a chunk of rows at a time, in one buffer that is used again."""

from collections.abc import Iterator

import torch
from torch import Tensor

MEBIBYTE = 1 << 20
# As large as costs little memory: a product of few rows reads the whole weight for them. The
# README has the measurement behind the CPU's; on CUDA nothing has been measured yet.
CPU_CHUNK_BYTES = 32 * MEBIBYTE
CUDA_CHUNK_BYTES = 128 * MEBIBYTE


def default_chunk_bytes(input: Tensor) -> int:
    """The size of the buffer on the device of the features."""
    return CUDA_CHUNK_BYTES if input.is_cuda else CPU_CHUNK_BYTES


def row_bytes(weight: Tensor, dtype: torch.dtype | None) -> int | torch.SymInt:
    """The bytes of one row of logits."""
    return weight.shape[0] * (dtype or weight.dtype).itemsize


def logit_chunks(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their logits ``F.linear(input[rows], weight, bias)``, valid until the next.

    The product is in ``dtype``, or that of the arguments. Chunks are of nearly equal size; for no
    rows at all there is one empty chunk.
    """
    dtype = dtype or weight.dtype
    limit = chunk_bytes or default_chunk_bytes(input)
    count = len(input)
    most = max(limit // int(row_bytes(weight, dtype)), 1)
    chunks = max(-(-count // most), 1)
    size = max(-(-count // chunks), 1)
    columns = weight.to(dtype).t()
    bias = None if bias is None else bias.to(dtype)
    buffer = columns.new_empty((min(size, count), columns.shape[1]))
    for start in range(0, max(count, 1), size):
        rows = slice(start, min(start + size, count))
        features = input[rows].to(dtype)
        logits = buffer[: len(features)]
        if bias is None:
            torch.mm(features, columns, out=logits)
        else:
            torch.addmm(bias, features, columns, out=logits)
        yield rows, logits
