"""Cases of the minimal margin score, its pairs of classes and their gradient."""

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from helpers.emulation import expected
from helpers.emulation.harness import Case
from helpers.emulation.margin_cases import rows_for
from helpers.emulation.tensors import (
    LAYOUTS,
    VALUES,
    Checked,
    assert_near,
    filled,
    laid_out,
    logits_of,
)

ROUNDING = (1e-5, 1e-12)  # of float32 and of float64
WEIGHTS = ("normal", "identity", "equal_rows", "tiny", "huge", "one_far", "nan")
FEATURES = (20, 1, 64, 7, 33, 3, 130, 8)


def weight_of(classes: int, features: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """The last layer's weight: ordinary, or where squares overflow, rows are equal, and so on."""
    if kind == "identity" and classes <= 65:
        return torch.eye(classes, max(classes, features)).to(dtype)
    weight = filled((classes, features), torch.float64, "normal", seed)
    narrow = dtype == torch.float16
    if kind == "equal_rows":
        weight[classes // 2 :] = weight[0]
    elif kind == "tiny":
        weight *= 1e-6 if narrow else 1e-30
    elif kind == "huge":
        weight *= 1e4 if narrow else 1e30
    elif kind == "one_far":
        weight[-1] *= 1e3
    elif kind == "nan":
        weight[classes // 3] = torch.nan
    return weight.to(dtype)


def heads(small: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None, bool, str, int]]:
    """Logits, weight, bias, whether nearest, a label and a seed."""
    weights, features = itertools.cycle(WEIGHTS), itertools.cycle(FEATURES)
    for logits, label, seed in logits_of(small):
        classes = logits.shape[1]
        wide = expected.result_dtype(logits.dtype)
        dtype = wide if seed % 3 == 0 else logits.dtype
        kind, width = next(weights), next(features) if classes < 5000 else 5
        layout = LAYOUTS[seed % 5]
        weight = laid_out(weight_of(classes, width, dtype, kind, seed), layout)
        bias = None
        if seed % 2:
            bias = laid_out(filled((classes,), dtype, "normal", seed + 1), LAYOUTS[seed % 4])
        label = f"{label}; weight {dtype} [{classes}, {width}] {layout} {kind}"
        for nearest in (False, True):
            if nearest and classes > 20000 and seed % 4:
                continue  # a few seconds of distances each
            yield logits, weight, bias, nearest, f"{label} nearest={nearest}", seed


def many_rows(small: bool) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor, bool, str]]:
    """So many rows that a table of all distances pays off: few rows, each many times."""
    count = 16400
    widths = [(3, torch.bfloat16), (40, torch.float32), (100, torch.float16), (128, torch.float64)]
    widths += [(5, torch.float16), (70, torch.bfloat16), (7, torch.float32), (9, torch.float64)]
    for seed, (classes, dtype) in enumerate(widths[:1] if small else widths):
        for nearest in (False, True) if seed < 4 else (True,):
            once = filled((97, classes), dtype, VALUES[seed % len(VALUES)], seed)
            which = torch.arange(count + seed) % 97
            wide = expected.result_dtype(dtype) if nearest else dtype
            weight = weight_of(classes, 9, wide, "normal", seed)
            bias = filled((classes,), wide, "normal", seed) if seed % 2 else None
            label = f"{dtype} [{count + seed}, {classes}] table nearest={nearest}"
            yield once, weight, bias, which, nearest, label


def minimal_margin_score(small: bool = False) -> Iterator[Checked]:
    """The score of every row."""
    for logits, weight, bias, nearest, label, _ in heads(small):
        yield score_case(logits, weight, bias, nearest, label)
    for logits, weight, bias, which, nearest, label in many_rows(small):
        yield score_case(logits, weight, bias, nearest, label, which)


def score_case(
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    nearest: bool,
    label: str,
    which: Tensor | None = None,
) -> Checked:
    """One call of the score, of ``logits[which]`` if given."""

    def check(outputs: dict[str, Tensor]) -> None:
        _, _, score = expected.pairs(logits, weight, bias, which, nearest)
        assert_near(outputs["score"], score, ROUNDING)

    given = logits if which is None else logits[which]

    inputs = {"logits": given, "weight": weight, "bias": bias}
    outputs = {"score": (expected.result_dtype(logits.dtype), (len(given),))}
    case = Case("minimal_margin_score", {"nearest": int(nearest)}, inputs, outputs)
    return Checked(case, check, label)


def minimal_margin_pair(small: bool = False) -> Iterator[Checked]:
    """The pair of classes behind the score of all rows, or of some."""
    for logits, weight, bias, nearest, label, seed in heads(small):
        rows = rows_for(logits, seed, LAYOUTS[seed % 3]) if seed % 2 else None
        yield pair_case(logits, weight, bias, rows, nearest, label)
    for logits, weight, bias, which, nearest, label in many_rows(small):
        yield pair_case(logits, weight, bias, which, nearest, label)


def pair_case(
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    nearest: bool,
    label: str,
) -> Checked:
    """One call of the pair. Where rounding decides who is nearest, either class will do."""

    def check(outputs: dict[str, Tensor]) -> None:
        pair, distance, score = expected.pairs(logits, weight, bias, rows, nearest)
        actual, reach = outputs["pair"].numpy(), outputs["distance"]
        assert actual[:, 0].tolist() == pair[:, 0].tolist()
        other = np.flatnonzero(actual[:, 1] != pair[:, 1])
        assert nearest or not len(other), f"row {other[0]}: {actual[other[0]]}"
        chosen = rows[other] if rows is not None else other
        for k, n in zip(other, chosen, strict=True):
            first, second = actual[k]
            values = expected.as_float64(logits[int(n)])
            offsets = None if bias is None else expected.as_float64(bias)
            all_reach = expected.distances_from(expected.as_float64(weight), offsets, first)
            distance[k] = all_reach[second]
            difference = expected.rounded(values[first] - values[second], logits.dtype)
            quotient = difference / distance[k]
            assert np.isfinite(quotient) and quotient > 0, f"row {k}: {actual[k]}, not {pair[k]}"
            np.testing.assert_allclose(quotient, score[k], rtol=ROUNDING[0])
        assert_near(reach, distance, ROUNDING)

    count = len(logits if rows is None else rows)
    inputs = {"logits": logits, "weight": weight, "bias": bias, "rows": rows}
    result = expected.result_dtype(logits.dtype)
    outputs = {"pair": (torch.int64, (count, 2)), "distance": (result, (count,))}
    case = Case("minimal_margin_pair", {"nearest": int(nearest)}, inputs, outputs)
    return Checked(case, check, label)
