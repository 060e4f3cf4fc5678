"""Cases of the moments of classes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.emulation import expected
from helpers.emulation.harness import Case
from helpers.emulation.tensors import DTYPES, LAYOUTS, Checked, assert_within, filled, laid_out

IGNORE = -7
# Rows, columns, classes: around the sizes of parts (32 rows up to 2^14 of them), of warps and
# blocks, and of the types of keys; rows of classes in one part and in many.
SHAPES = [
    (1, 1, 1),
    (32, 3, 1),
    (33, 64, 2),
    (64, 0, 3),
    (70, 513, 3),
    (100, 8, 1000),
    (150, 33, 6),
    (200, 64, 1),
    (300, 130, 7),
    (90, 300, 255),
    (500, 1, 5),
    (40, 2100, 4),
    (3, 4104, 2),
    (320, 5, 33_000),
]
# Beside those of tensors.py: far from 0, equal rows, and numbers whose squares underflow.
VALUES = ("normal", "far", "equal", "infinite", "nan", "zeros", "tiny", "extreme")


def class_moments(small: bool = False) -> Iterator[Checked]:
    """All dtypes, layouts and kinds of values, ignored rows and empty classes."""
    for seed, (rows, columns, classes) in enumerate(SHAPES):
        for turn in range(2 if small else 4):
            if (small and rows * columns > 30_000) or (classes > 1000 and (small or turn)):
                continue
            dtype = DTYPES[(seed + turn) % len(DTYPES)]
            layout, kind = LAYOUTS[(seed + 2 * turn) % 5], VALUES[(seed + 3 * turn) % len(VALUES)]
            normalize = (seed // 2 + turn) % 2 == 1
            # Arithmetic in float64 has nothing wider to go to.
            normalize |= dtype == torch.float64 and kind in ("tiny", "extreme")
            target = target_for(rows, classes, seed + turn)
            values = laid_out(values_for(target, columns, dtype, kind, seed), layout)
            label = f"{dtype} [{rows}, {columns}] {layout} {kind}, {classes} classes, {normalize}"
            spread = laid_out(target, LAYOUTS[seed % 4])
            yield moments_case(values, spread, classes, normalize, label)
    for dtype, kind, layout in [  # in float64 once more, in pieces and in whole classes
        (torch.float32, "tiny", "contiguous"),
        (torch.float32, "extreme", "misaligned"),
        (torch.bfloat16, "huge", "contiguous"),
        (torch.bfloat16, "tiny", "column_major"),
    ]:
        target = target_for(100, 5, 1)
        values = laid_out(values_for(target, 40, dtype, kind, 1), layout)
        yield moments_case(values, target, 5, False, f"{dtype} {kind} {layout}")


def many_rows() -> Checked:
    """Parts of 256 rows."""
    target = target_for(70_000, 3, 1)
    values = values_for(target, 1, torch.float32, "far", 1)
    return moments_case(values, target, 3, False, "many rows")


def target_for(rows: int, classes: int, seed: int) -> Tensor:
    """Classes of very different sizes, and every seed but one of three ignored rows."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(rows, generator=generator) ** 2 * classes).long()
    if seed % 3:
        target[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    return target


def values_for(target: Tensor, columns: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Rows of one of the kinds of ``VALUES``, or of huge numbers."""
    shape = (len(target), columns)
    values = filled(shape, torch.float64, "normal", seed)
    if kind in ("infinite", "nan", "extreme") and columns:
        rare = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.05
        return torch.where(rare, filled(shape, dtype, kind, seed), values.to(dtype))
    if kind == "far":
        values += 1000
    elif kind == "equal":
        values = values[:1].expand(shape)
    elif kind == "zeros":
        values[::3] = 0
    elif kind == "tiny":
        values *= torch.finfo(dtype).tiny * 8
    elif kind == "huge":
        values = values.clamp(-4, 4) * (torch.finfo(dtype).max / 8)
    return values.to(dtype)


def moments_case(
    input: Tensor, target: Tensor, classes: int, normalize: bool, label: str
) -> Checked:
    """One call for moments."""
    result, columns = expected.result_dtype(input.dtype), input.shape[1]

    def check(outputs: dict[str, Tensor]) -> None:
        wanted = expected.class_moments(input, target, classes, normalize, IGNORE)
        assert outputs["count"].tolist() == wanted.count.tolist()
        # What follows from rounding the rows that are normalised, and the distances.
        rows = 4 * torch.finfo(result).eps * normalize
        mean = 16 * torch.finfo(result).eps * wanted.reach + rows
        actual = expected.as_float64(outputs["mean"])
        assert_within(actual, expected.rounded(wanted.mean, result), mean, result)
        radius = 32 * torch.finfo(result).eps * wanted.radius + rows
        actual = expected.as_float64(outputs["radius"])
        assert_within(actual, expected.rounded(wanted.radius, result), radius, result)
        still = wanted.radius == 0
        assert not actual[still].any(), "equal rows have a radius"

    numbers = {"classes": classes, "normalize": int(normalize), "ignore_index": IGNORE}
    outputs = {
        "count": (torch.int64, (classes,)),
        "mean": (result, (classes, columns)),
        "radius": (result, (classes,)),
    }
    case = Case("class_moments", numbers, {"input": input, "target": target}, outputs)
    return Checked(case, check, label)
