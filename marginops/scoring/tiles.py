"""Scores rows tile by tile: the values of a tile stay in the cache until its statistics are known.

The tiles are cut from the first row of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import result_dtype
from ..ops.tiles import default_chunk_bytes, logit_tiles, tile_shape
from .head import Head
from .statistics import (
    mark_not_finite,
    mark_unlabelled,
    result_type,
    statistics_of_features,
    statistics_of_logits,
)

# Tiles of 1,024 to 8,192 rows measured equally fast on the CPU.
_CPU_ROWS = 2048
_CUDA_ROWS = 65536
# Below this number of rows a product spends its time on reading the weight.
_ENOUGH_ROWS = 1024
# The bits of a product depend on where its arguments begin within so many bytes. Buffers of torch
# begin on a multiple, and so does every tile of a multiple of 16 rows.
_ALIGNMENT = 64
_ALIGNED_ROWS = 16

KINDS = ("finite", "missing", "nan", "infinite", "overflow")
MISSING, NAN, INFINITE, OVERFLOW = range(1, 5)


@dataclass(frozen=True)
class Scores:
    """The scores of N rows, on the CPU.

    Attributes:
        values: Each statistic, ``[N]``.
        kinds: ``[N]`` uint8, positions in KINDS.
        features: ``[N, D]``, the converted values, where they are kept.
    """

    values: dict[str, Tensor]
    kinds: Tensor
    features: Tensor | None


class Parameters(NamedTuple):
    """Weight and bias on a device, and what tells rows that are not finite.

    Attributes:
        limit: Features with a smaller sum of squares have finite logits.
        uses_all: Whether each feature has a weight other than 0 in some class. Then finite logits
            have finite features.
    """

    weight: Tensor
    bias: Tensor | None
    limit: float
    uses_all: bool


class PlacedHead:
    """A head on a device, in each dtype that a batch needs."""

    def __init__(self, head: Head, device: torch.device) -> None:
        self.head = head
        self.dtype = head.weight.dtype
        self.num_classes, self.width = head.weight.shape
        self._device = device
        self._copies: dict[torch.dtype, Parameters] = {}

    def parameters(self, dtype: torch.dtype) -> Parameters:
        """The parameters in a dtype."""
        if dtype not in self._copies:
            weight = self.head.weight.to(self._device, dtype)
            bias = self.head.bias
            bias = None if bias is None else bias.to(self._device, dtype)
            # |w . h + b| <= |w| |h| + |b|, also for every partial sum.
            norm = float(torch.linalg.vector_norm(weight, dim=1).max())
            offset = 0.0 if bias is None else float(bias.abs().max())
            root = max(torch.finfo(dtype).max / 4 - offset, 0.0) / max(norm, 1e-30)
            uses_all = bool(weight.any(0).all())
            self._copies[dtype] = Parameters(weight, bias, root * root, uses_all)
        return self._copies[dtype]


@contextmanager
def same_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute as a new process does, whatever the caller has set: gradients, autocast, and float32
    products in TF32 or bfloat16.
    """
    backends: Any = torch.backends
    products = backends.mkldnn.matmul, backends.cuda.matmul
    before = [(product, product.fp32_precision) for product in products]
    reduced = [(product, name) for product, name in before if name not in ("none", "ieee")]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            for product, _ in reduced:
                product.fp32_precision = "ieee"
            yield
        finally:
            for product, name in reduced:
                product.fp32_precision = name


def score_rows(
    values: Tensor,
    label: Tensor | None,
    unlabelled: Tensor | None,
    statistics: Sequence[str],
    head: PlacedHead | None,
    device: torch.device,
    log_norm: float | None,
    keep_features: bool = False,
) -> Scores:
    """Compute statistics of features ``[N, D]``, or of logits ``[N, C]`` without a head.

    Args:
        values: Any floating-point dtype, on any device.
        label: ``[N]`` int64, all in [0, C).
        unlabelled: ``[N]`` bool, the rows whose label does not count; None if all count.
        statistics: Names of statistics.
        head: The head whose input the values are.
        device: Where to compute.
        log_norm: See :func:`marginops.classification_margin`.
        keep_features: Whether to return the converted values.
    """
    values = values.to(device)
    label = None if label is None else label.to(device)
    dtype = result_dtype(values.dtype)
    if head is not None:
        dtype = torch.promote_types(dtype, head.dtype)
    rows, width = values.shape
    is_ready = values.dtype == dtype and values.is_contiguous()
    is_ready = is_ready and values.data_ptr() % _ALIGNMENT == 0
    converted = values if is_ready else None
    if keep_features and converted is None:
        converted = values.new_empty(values.shape, dtype=dtype)
    tile_rows, streams = _tile_rows(values, dtype, head)
    buffer = None
    if converted is None:
        buffer = values.new_empty((min(tile_rows, rows), width), dtype=dtype)
    product = None
    if head is not None and not streams:
        product = values.new_empty((min(tile_rows, rows), head.num_classes), dtype=dtype)
    kinds = torch.zeros(rows, dtype=torch.uint8, device=device)
    results = {
        name: torch.empty(rows, dtype=result_type(name, dtype), device=device)
        for name in statistics
    }
    for start in range(0, rows, tile_rows):
        piece = slice(start, min(start + tile_rows, rows))
        size = piece.stop - start
        tile = converted[piece] if converted is not None else buffer[:size]  # type: ignore[index]
        if not is_ready:
            tile.copy_(values[piece])
        found = _score_tile(
            tile,
            None if label is None else label[piece],
            statistics,
            head,
            None if product is None else product[:size],
            log_norm,
            kinds[piece],
        )
        for name, result in results.items():
            result[piece] = found[name]
    if unlabelled is not None:
        mark_unlabelled(results, unlabelled.to(device))
    kept = converted.cpu() if keep_features and converted is not None else None
    return Scores(*_on_cpu(results, kinds), kept)


def _tile_rows(values: Tensor, dtype: torch.dtype, head: PlacedHead | None) -> tuple[int, bool]:
    """The number of rows of a tile, and whether it has too many classes for a buffer of logits."""
    most = _CUDA_ROWS if values.is_cuda else _CPU_ROWS
    capacity = default_chunk_bytes(values) // dtype.itemsize
    most = _whole_rows(min(most, capacity // max(values.shape[1], 1)))
    if head is None:
        return most, False
    fitting = min(most, capacity // head.num_classes)
    is_few = fitting < min(most, _ENOUGH_ROWS)
    return (most, True) if is_few else (_whole_rows(fitting), False)


def _whole_rows(rows: int) -> int:
    """The number of rows, rounded to one after which the next tile is aligned."""
    return max(rows - rows % _ALIGNED_ROWS, _ALIGNED_ROWS)


def _score_tile(
    tile: Tensor,
    label: Tensor | None,
    statistics: Sequence[str],
    head: PlacedHead | None,
    product: Tensor | None,
    log_norm: float | None,
    kinds: Tensor,
) -> dict[str, Tensor]:
    """The statistics of a tile. Writes the kinds of its rows."""
    if head is None:
        if not _has_finite_sum(tile):
            kinds.copy_(_kinds(tile, []))
        return statistics_of_logits(statistics, tile, label, None, None, log_norm)
    weight, bias, limit, uses_all = head.parameters(tile.dtype)
    if product is None:
        if not _has_squares_below(limit, tile):
            shape = tile_shape(tile, weight, None, None)
            pieces = logit_tiles(tile, weight, bias, None, shape)
            kinds.copy_(_kinds(tile, ((rows, logits) for rows, _, logits in pieces)))
        return statistics_of_features(statistics, tile, label, (weight, bias), log_norm)
    if bias is None:
        torch.mm(tile, weight.t(), out=product)
    else:
        torch.addmm(bias, tile, weight.t(), out=product)
    values = statistics_of_logits(statistics, product, label, tile, (weight, bias), log_norm)
    if not (_has_finite_sum(product) if uses_all else _has_squares_below(limit, tile)):
        kinds.copy_(_kinds(tile, [(slice(None), product)]))
    return values


# One sum tells for almost every tile that all of its rows are finite. On a GPU it would wait for
# the device, where a look at each value costs little.


def _has_finite_sum(values: Tensor) -> bool:
    return not values.is_cuda and math.isfinite(values.sum().item())


def _has_squares_below(limit: float, values: Tensor) -> bool:
    if values.is_cuda:
        return False
    flat = values.view(-1)
    return float(torch.dot(flat, flat)) < limit


def _kinds(tile: Tensor, logits: Iterable[tuple[slice, Tensor]]) -> Tensor:
    """The kind of each row, from all of its values and logits."""
    overflow = torch.zeros(len(tile), dtype=torch.bool, device=tile.device)
    for rows, part in logits:
        overflow[rows] |= ~part.isfinite().all(1)
    return kinds_of_values(tile, torch.where(overflow, OVERFLOW, 0))


def kinds_of_values(values: Tensor, otherwise: Tensor | int) -> Tensor:
    """NAN or INFINITE for each row with such a value, else another kind."""
    kinds = torch.where(values.isfinite().all(1), otherwise, INFINITE)
    return torch.where(values.isnan().any(1), NAN, kinds).to(torch.uint8)


def _on_cpu(results: dict[str, Tensor], kinds: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The results, which come from a GPU in one copy. float64 holds all of them exactly."""
    if not kinds.is_cuda:
        return results, kinds
    columns = [*results.values(), kinds]
    whole = torch.stack([column.double() for column in columns]).cpu()
    *values, kinds = (row.to(column.dtype) for row, column in zip(whole, columns, strict=True))
    return dict(zip(results, values, strict=True)), kinds


def finish(scores: Scores, missing: Tensor | None) -> tuple[Tensor, dict[str, int]]:
    """Mark missing rows and rows that are not finite.

    Returns:
        ``[N]`` bool, whether each row is finite, and the number of rows of each other kind.
    """
    if missing is not None:
        scores.kinds.masked_fill_(missing, MISSING)
    wrong = scores.kinds != 0
    counts = torch.bincount(scores.kinds, minlength=len(KINDS)).tolist()
    if counts[0] < len(wrong):
        mark_not_finite(scores.values, wrong)
    return ~wrong, dict(zip(KINDS[1:], counts[1:], strict=True))
