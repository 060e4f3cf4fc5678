"""Tensors for the cases: shapes, dtypes, memory layouts, awkward values; and comparisons."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from helpers.emulation.expected import Floats
from helpers.emulation.harness import Case

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "misaligned", "padded", "every_other", "column_major")
STEEP_VALUES = ("steep", "confident")
VALUES = ("normal", "ties", "infinite", "nan", "extreme", "ascending", "zeros")


@dataclass
class Checked:
    """A case, and the check of its outputs, which raises an AssertionError."""

    case: Case
    check: Callable[[dict[str, Tensor]], None]
    label: str


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout: poison between them, nothing behind them."""
    if values.dim() == 1:
        step, offset = {"contiguous": (1, 0), "misaligned": (1, 1)}.get(layout, (2, 3))
        strides: tuple[int, ...] = (step,)
    else:
        rows, cols = values.shape
        strides, offset = {
            "contiguous": ((cols, 1), 0),
            "misaligned": ((cols, 1), 1),
            "padded": ((cols + 3, 1), 5),
            "every_other": ((2 * cols + 1, 2), 1),
            "column_major": ((1, rows), 0),
        }[layout]
    reach = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    size = offset + reach + 1 if values.numel() else 0
    poison = torch.nan if values.dtype.is_floating_point else torch.iinfo(values.dtype).max
    buffer = torch.full((size,), poison, dtype=values.dtype)
    return buffer.as_strided(values.shape, strides, offset if size else 0).copy_(values)


def filled(shape: tuple[int, ...], dtype: torch.dtype, values: str, seed: int) -> Tensor:
    """Random numbers of one of the kinds of ``VALUES`` and ``STEEP_VALUES``."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    coin = torch.rand(shape, generator=generator)
    if values == "ties":
        normal = (normal * 1.5).round()
    elif values == "infinite":
        normal = torch.where(coin < 0.1, torch.inf, torch.where(coin < 0.4, -torch.inf, normal))
        if len(shape) == 2 and shape[0] > 2:
            normal[1], normal[2] = -torch.inf, torch.inf
    elif values == "nan":
        rare = 0.2 if len(shape) == 1 else 0.5 / shape[-1]
        signed = torch.where(normal > 0, torch.nan, -torch.tensor(torch.nan, dtype=normal.dtype))
        normal = torch.where(coin < rare, signed, normal)
    elif values == "extreme":
        normal = normal.sign() * torch.finfo(dtype).max * (1 - coin.double() / 4)
    elif values == "ascending":
        normal = normal.sort(-1).values
    elif values == "steep":  # probabilities of 0 and 1
        normal = normal.sign() * 1e4 * coin.double().round(decimals=2)
    elif values == "confident":  # probabilities close to 1
        normal[..., -1] = 12 + 20 * coin[..., -1].double()
    elif values == "zeros":
        normal = torch.where(coin < 0.5, 0.0, -torch.zeros((), dtype=normal.dtype))
    return normal.to(dtype)


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Equal values, NaN equal to NaN."""
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def assert_near(actual: Tensor, wanted: Floats, rtol: tuple[float, float]) -> None:
    """Equal but for rounding; ``rtol`` is that of float32 and that of float64."""
    narrow = actual.dtype != torch.float64
    tolerance = rtol[0] if narrow else rtol[1]
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(
        actual,
        torch.from_numpy(wanted).to(actual.dtype),
        rtol=tolerance,
        atol=2 * smallest,  # results that underflow
        equal_nan=True,
    )


def assert_within(actual: Floats, wanted: Floats, error: Floats, dtype: torch.dtype) -> None:
    """Equal but for an error and the rounding to ``dtype``; NaN and infinities at their places."""
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(actual[~finite], wanted[~finite])
    rounding = torch.finfo(dtype).eps * np.abs(wanted) + torch.finfo(dtype).smallest_normal
    wrong = finite & ~(np.abs(actual - wanted) <= error + rounding)
    assert not wrong.any(), f"{actual[wrong][:5]}, not {wanted[wrong][:5]}, at {wrong.nonzero()}"


def shapes(small: bool) -> Iterator[tuple[int, int]]:
    """Numbers of rows and classes around every width at which a kernel may change its ways."""
    widths = [2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 65, 127, 129, 257, 512, 1000, 1025, 2049, 4099]
    widths += [10007, 33001, 70003]
    if small:
        widths = [2, 5, 9, 17, 33, 65, 129, 257, 1025, 4099, 33001]
    counts = itertools.cycle([3, 1, 33, 7, 2, 65, 5])
    for width in widths:
        most = max(1, (2000 if small else 20000) // width)
        yield min(next(counts), most), width
    if not small:
        yield 300, 10
        yield 1100, 3


def logits_of(small: bool) -> Iterator[tuple[Tensor, str, int]]:
    """Logits of all dtypes, shapes, layouts and kinds of values, a label, and a seed."""
    turns = range(1 if small else len(DTYPES))
    for seed, ((rows, cols), _) in enumerate(itertools.product(shapes(small), turns)):
        dtype = DTYPES[(seed + seed // len(DTYPES)) % len(DTYPES)]
        layout, kind = LAYOUTS[seed % len(LAYOUTS)], VALUES[seed % len(VALUES)]
        label = f"{dtype} [{rows}, {cols}] {layout} {kind}"
        yield laid_out(filled((rows, cols), dtype, kind, seed), layout), label, seed


def short_rows(small: bool) -> Iterator[tuple[Tensor, str]]:
    """Logits of rows of at most 128 bytes side by side, on a 16-byte boundary and beside one."""
    counts = itertools.cycle((129, 1, 300, 127, 128))
    for dtype in DTYPES:
        pack = 16 // dtype.itemsize
        for classes in (2, 5, pack, 12, 2 * pack) if small else range(2, 8 * pack + 1):
            for offset in (0, 1 + classes % (pack - 1)):
                rows = next(counts)
                buffer = torch.full((offset + rows * classes,), torch.nan, dtype=dtype)
                logits = buffer[offset:].view(rows, classes)
                logits.copy_(filled((rows, classes), dtype, "normal", classes))
                yield logits, f"{dtype} [{rows}, {classes}] after {offset} scalars"
