"""Cases of the statistics of samples and of shards, and of their gradient."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from helpers.emulation import expected
from helpers.emulation.harness import Case
from helpers.emulation.margin_cases import IGNORE, target_for
from helpers.emulation.tensors import (
    DTYPES,
    LAYOUTS,
    STEEP_VALUES,
    Checked,
    assert_near,
    assert_same,
    assert_within,
    filled,
    laid_out,
    logits_of,
)

ROUNDING = (3e-5, 1e-12)  # of float32 and of float64
DENSE = ("grad_loss", "grad_confidence", "grad_entropy")


def assert_rounded(actual: Tensor, wanted: expected.Floats, smallest: float = 0.0) -> None:
    """Equal but for rounding, and for what is subnormal or within ``smallest``."""
    wanted = expected.rounded(wanted, actual.dtype)
    error = ROUNDING[actual.dtype == torch.float64] * np.abs(wanted) + smallest
    assert_within(expected.as_float64(actual), wanted, error, actual.dtype)


def statistics_logits(small: bool) -> Iterator[tuple[Tensor, str, int]]:
    """The usual logits, and probabilities close to 0 and 1."""
    yield from logits_of(small)
    widths = (2, 10, 40, 300) if small else (2, 3, 10, 40, 100, 300, 1000, 5000)
    for seed, (cols, kind) in enumerate(itertools.product(widths, STEEP_VALUES)):
        dtype, layout = DTYPES[(seed + seed // 4) % 4], LAYOUTS[seed % 5]
        label = f"{dtype} [5, {cols}] {layout} {kind}"
        yield laid_out(filled((5, cols), dtype, kind, seed), layout), label, seed


def sample_statistics(small: bool = False) -> Iterator[Checked]:
    """All statistics, with and without the norms of inputs and of the network."""
    norms = itertools.cycle((None, 3.5, -20.0))
    for logits, label, seed in statistics_logits(small):
        target = target_for(logits, seed, LAYOUTS[seed % 4])
        result = expected.result_dtype(logits.dtype)
        input_norm = None
        if seed % 4:
            input_norm = filled((len(logits),), torch.float64, "normal", seed).exp().to(result)
            input_norm = laid_out(input_norm, LAYOUTS[seed % 4])
        yield statistics_case(logits, target, input_norm, next(norms), label)


def statistics_case(
    logits: Tensor, target: Tensor, input_norm: Tensor | None, norm: float | None, label: str
) -> Checked:
    """One call for the statistics of samples."""
    result, count = expected.result_dtype(logits.dtype), len(logits)

    def check(outputs: dict[str, Tensor]) -> None:
        margin = expected.margins(logits, target, IGNORE, norm)
        assert_near(outputs["margin"], margin, (0, 0) if norm is None else (2e-6, 1e-12))
        assert outputs["rival"].tolist() == expected.rivals(logits, target, None, IGNORE)
        wanted = expected.softmax(logits, target, IGNORE)
        assert outputs["correct"].tolist() == wanted.correct
        counted = target != IGNORE
        maximum = torch.from_numpy(wanted.maximum)[counted]
        assert_same(outputs["maximum"][counted], maximum.to(result))
        assert_rounded(outputs["log_sum"][counted], wanted.log_sum[counted.numpy()])
        for name in ("loss", "confidence", "entropy"):
            assert_rounded(outputs[name], getattr(wanted, name))
        smallest = torch.finfo(result).tiny ** 0.5  # the root of squares that underflow
        assert_rounded(outputs["el2n"], wanted.el2n, smallest)
        if input_norm is not None:
            factor = np.hypot(1, expected.as_float64(input_norm))
            assert_rounded(outputs["gradient_norm"], wanted.el2n * factor, smallest * factor.max())

    names = ["margin", "loss", "confidence", "entropy", "el2n", "maximum", "log_sum"]
    names += ["gradient_norm"] if input_norm is not None else []
    outputs = {name: (result, (count,)) for name in names}
    outputs |= {"rival": (torch.int64, (count,)), "correct": (torch.bool, (count,))}
    numbers: dict[str, int | float] = {"ignore_index": IGNORE}
    if norm is not None:
        numbers["log_norm"] = norm
    inputs = {"logits": logits, "target": target, "input_norm": input_norm}
    return Checked(Case("sample_statistics", numbers, inputs, outputs), check, label)


def row_sums(small: bool = False) -> Iterator[Checked]:
    """Statistics of a part of the classes, one class at least; targets may lie elsewhere."""
    for rows, dtype, layout in (
        (3, torch.float32, "padded"),
        (130, torch.bfloat16, "contiguous"),
        (129, torch.float16, "misaligned"),
    ):
        logits = laid_out(filled((rows, 1), dtype, "infinite", 0), layout)
        target = target_for(logits, 0, "contiguous")
        yield shard_case(logits, target, f"{dtype} [{rows}, 1]")
    for logits, label, seed in statistics_logits(small):
        generator = torch.Generator().manual_seed(seed)
        target = torch.randint(-2, logits.shape[1] + 3, (len(logits),), generator=generator)
        yield shard_case(logits, laid_out(target, LAYOUTS[seed % 4]), label, seed % 3 > 0)


def shard_case(logits: Tensor, target: Tensor, label: str, with_sums: bool = True) -> Checked:
    """One call for the statistics of a shard, or for its two largest logits only."""
    count, classes = logits.shape

    def check(outputs: dict[str, Tensor]) -> None:
        values, places = outputs["values"], outputs["classes"]
        largest, sums = expected.shard_sums(logits)
        exact = torch.from_numpy(largest).to(values.dtype)
        assert_same(values[:, 0], exact[:, 0])
        known = ~exact[:, 0].isnan()
        wide, rows = logits.to(values.dtype), range(count)
        here = (target >= 0) & (target < classes)
        own = torch.where(here, wide[rows, target.clamp(0, classes - 1)], 0)
        assert_same(values[:, 2], own)
        finite = exact[:, 0].isfinite()
        assert_same(values[finite, 1], exact[finite, 1])
        assert_rounded(values[finite, 3:], sums[finite.numpy()] * with_sums)
        nothing = exact[:, 0] == -torch.inf
        assert not values[nothing, 3:].any()
        for n in rows:
            first, second = places[n].tolist()
            assert 0 <= first < classes and second < classes, f"row {n}: {first}, {second}"
            if known[n]:
                row = expected.as_float64(logits[n])
                assert first == expected.strongest(row)
                assert second == (expected.strongest(row, first) if classes > 1 else -1)

    outputs = {
        "values": (expected.result_dtype(logits.dtype), (count, 6)),
        "classes": (torch.int64, (count, 2)),
    }
    case = Case(
        "row_sums",
        {"with_sums": int(with_sums)},
        {"logits": logits, "target": target},
        outputs,
    )
    return Checked(case, check, label)


def sample_statistics_gradient(small: bool = False) -> Iterator[Checked]:
    """The gradient for every choice of fields, dense ones or the margin's alone; and of shards."""
    choices = [("grad_loss",), ("grad_margin",), DENSE, ("grad_margin", *DENSE), (), DENSE[2:]]
    norms = itertools.cycle((None, 3.5, -5.0))
    for turn, (logits, label, seed) in enumerate(statistics_logits(small)):
        target = target_for(logits, seed, LAYOUTS[seed % 4])
        given = choices[turn % len(choices)]
        yield gradient_case(logits, target, given, next(norms), seed, f"{label} {given}")
        if seed % 3 == 0:
            begin, width = logits.shape[1] // 3, logits.shape[1] // 2
            shard = slice(begin, begin + width)
            yield gradient_case(logits, target, DENSE, None, seed, f"{label} {shard}", shard)
            yield gradient_case(logits, target, given, 3.5, seed, f"{label} {shard}", shard)


def gradient_case(
    logits: Tensor,
    target: Tensor,
    given: tuple[str, ...],
    norm: float | None,
    seed: int,
    label: str,
    shard: slice = slice(0, None),
) -> Checked:
    """One gradient, from the statistics that the forward op would have saved.

    It is asked for the classes of ``shard`` only, and labels and rivals may be others.
    """
    result, count = expected.result_dtype(logits.dtype), len(logits)
    statistics = expected.softmax(logits, target, IGNORE)
    rival = expected.rivals(logits, target, None, IGNORE)
    columns: dict[str, Tensor | None] = {
        name: laid_out(torch.from_numpy(getattr(statistics, name)).to(result), LAYOUTS[seed % 4])
        for name in ("confidence", "entropy", "maximum", "log_sum")
    }
    for i, name in enumerate(("grad_margin", *DENSE)):
        column = laid_out(filled((count,), result, "normal", seed + i), LAYOUTS[(seed + i) % 4])
        if (seed + i) % 5 == 0:
            column = torch.full((1,), 0.7, dtype=result).expand(count)
        columns[name] = column if name in given else None

    def check(outputs: dict[str, Tensor]) -> None:
        numbers = {
            name: None if column is None else expected.as_float64(column)
            for name, column in columns.items()
        }
        labels = [None if y == IGNORE else y for y in target.tolist()]
        scale = 1.0 if norm is None else float(np.exp(-norm))
        wanted, size = expected.statistics_gradients(logits, labels, rival, numbers, scale)
        error = torch.finfo(result).eps * 32 * np.where(np.isfinite(size), size, 0)
        actual = expected.as_float64(outputs["grad_logits"])
        assert_within(actual, wanted[:, shard], error[:, shard], logits.dtype)

    numbers: dict[str, int | float] = {"ignore_index": IGNORE}
    if norm is not None:
        numbers["log_norm"] = norm
    part = logits[:, shard]
    local = torch.where(target == IGNORE, IGNORE, target - shard.start)
    inputs = {
        "logits": part,
        "target": laid_out(local, LAYOUTS[seed % 4]),
        "rival": torch.tensor(rival, dtype=torch.int64) - shard.start,
        **columns,
    }
    outputs = {"grad_logits": (logits.dtype, tuple(part.shape))}
    case = Case("sample_statistics_gradient", numbers, inputs, outputs)
    return Checked(case, check, label)
