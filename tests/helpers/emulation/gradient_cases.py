"""Cases of the sums and distances that gradients need."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.emulation import expected
from helpers.emulation.harness import Case
from helpers.emulation.score_cases import FEATURES, ROUNDING, WEIGHTS, weight_of
from helpers.emulation.tensors import (
    DTYPES,
    LAYOUTS,
    Checked,
    assert_near,
    assert_within,
    filled,
    laid_out,
)


def pair_gradient(small: bool = False) -> Iterator[Checked]:
    """Sums over sorted pairs: classes with many, with few and without any."""
    sizes = [(0, 3), (1, 2), (2, 3), (31, 5), (33, 2), (600, 2), (300, 40), (1000, 7), (2000, 1000)]
    layouts, dtypes, widths = itertools.cycle(LAYOUTS), itertools.cycle(DTYPES), (*FEATURES, 300)
    for seed, ((size, classes), features) in enumerate(itertools.product(sizes, widths)):
        if small and (size > 600 or seed % 3):
            continue
        generator = torch.Generator().manual_seed(seed)
        dtype, layout = next(dtypes), next(layouts)
        if seed % 4 == 3:
            next(dtypes)
        weight = laid_out(filled((classes, features), dtype, "normal", seed), layout)
        bias = laid_out(filled((classes,), dtype, "normal", seed), LAYOUTS[seed % 4])
        first = (torch.rand(size, generator=generator) ** 3 * classes).long()
        second = torch.randint(classes, (size,), generator=generator)
        key = (first * classes + second).sort().values
        coefficient = filled((size,), expected.result_dtype(dtype), "normal", seed)
        label = f"{dtype} [{size}] of [{classes}, {features}] {layout}"
        yield gradient_case(key, coefficient, weight, bias if seed % 2 else None, label)


def gradient_case(
    key: Tensor, coefficient: Tensor, weight: Tensor, bias: Tensor | None, label: str
) -> Checked:
    """One gradient."""

    def check(outputs: dict[str, Tensor]) -> None:
        wanted, magnitude = expected.pair_gradients(key, coefficient, weight, bias)
        columns = (outputs["grad_weight"], outputs["grad_bias"][:, None])
        actual = expected.as_float64(torch.cat(columns, 1))
        error = torch.finfo(coefficient.dtype).eps * 64 * magnitude
        assert_within(actual, wanted, error, weight.dtype)

    inputs = {"key": key, "coefficient": coefficient, "weight": weight, "bias": bias}
    outputs = {
        "grad_weight": (weight.dtype, tuple(weight.shape)),
        "grad_bias": (weight.dtype, (len(weight),)),
    }
    return Checked(Case("pair_gradient", {}, inputs, outputs), check, label)


def pair_distance(small: bool = False) -> Iterator[Checked]:
    """Distances of pairs of rows of weight, equal ones among them."""
    widths, layouts = itertools.cycle((*FEATURES, 300)), itertools.cycle(LAYOUTS)
    kinds, counts = itertools.cycle(WEIGHTS), itertools.cycle((1, 5, 40, 9))
    for seed in range(6 if small else 40):
        generator = torch.Generator().manual_seed(seed)
        dtype, classes = DTYPES[(seed + seed // 4) % 4], (3, 10, 200)[seed % 3]
        weight = laid_out(weight_of(classes, next(widths), dtype, next(kinds), seed), next(layouts))
        bias = filled((classes,), dtype, "normal", seed) if seed % 2 else None
        pair = torch.randint(classes, (next(counts), 2), generator=generator)
        pair = laid_out(pair, LAYOUTS[seed % 5])
        yield distance_case(weight, bias, pair, f"{dtype} {list(weight.shape)} {len(pair)} pairs")


def distance_case(weight: Tensor, bias: Tensor | None, pair: Tensor, label: str) -> Checked:
    """One call for distances."""

    def check(outputs: dict[str, Tensor]) -> None:
        columns = expected.as_float64(weight)
        offsets = None if bias is None else expected.as_float64(bias)
        wanted = [expected.distances_from(columns, offsets, i)[j] for i, j in pair.tolist()]
        assert_near(outputs["distance"], expected.floats(wanted), ROUNDING)

    inputs = {"weight": weight, "bias": bias, "pair": pair}
    outputs = {"distance": (expected.result_dtype(weight.dtype), (len(pair),))}
    return Checked(Case("pair_distance", {}, inputs, outputs), check, label)


def class_sum(small: bool = False) -> Iterator[Checked]:
    """Sums over sorted entries: classes with many, with few and without any."""
    sizes = [(0, 3), (1, 1), (5, 4), (255, 1), (256, 2), (257, 2), (600, 1), (1500, 3), (1300, 90)]
    layouts, dtypes, widths = itertools.cycle(LAYOUTS), itertools.cycle(DTYPES), (*FEATURES, 300)
    for seed, ((size, classes), features) in enumerate(itertools.product(sizes, widths)):
        dtype, layout = next(dtypes), next(layouts)
        if seed % 9 == 8:
            next(dtypes)
        if small and seed % 4:
            continue
        generator = torch.Generator().manual_seed(seed)
        count = max(1, size // 2)
        rows = laid_out(filled((count, features), dtype, "normal", seed), layout)
        label = (torch.rand(size, generator=generator) ** 3 * classes).long()
        key = (label * count + torch.randint(count, (size,), generator=generator)).sort().values
        coefficient = filled((size,), expected.result_dtype(dtype), "normal", seed)
        name = f"{dtype} {size} of [{count}, {features}] {layout}, {classes} classes"
        yield sum_case(key, coefficient, rows, classes + seed % 3, name)


def sum_case(key: Tensor, coefficient: Tensor, rows: Tensor, classes: int, label: str) -> Checked:
    """One call for sums."""
    shape = (classes, rows.shape[1])

    def check(outputs: dict[str, Tensor]) -> None:
        wanted, magnitude = expected.class_sums(key, coefficient, rows, classes)
        error = torch.finfo(coefficient.dtype).eps * 64 * magnitude
        actual = expected.as_float64(outputs["result"])
        assert_within(actual, wanted, error, coefficient.dtype)

    inputs = {"key": key, "coefficient": coefficient, "rows": rows}
    outputs = {"result": (coefficient.dtype, shape)}
    return Checked(Case("class_sum", {"classes": classes}, inputs, outputs), check, label)
