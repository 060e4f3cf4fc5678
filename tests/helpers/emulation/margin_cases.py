"""Cases of the classification margin and of its rival classes."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from helpers.emulation import expected
from helpers.emulation.harness import Case
from helpers.emulation.tensors import (
    LAYOUTS,
    Checked,
    assert_near,
    assert_same,
    laid_out,
    logits_of,
    short_rows,
)

IGNORE = -100


def target_for(logits: Tensor, seed: int, layout: str) -> Tensor:
    """Random classes, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(logits.shape[1], (len(logits),), generator=generator)
    target[torch.rand(len(logits), generator=generator) < 0.2] = IGNORE
    return laid_out(target, layout)


def rows_for(logits: Tensor, seed: int, layout: str) -> Tensor:
    """Random rows, some more than once."""
    generator = torch.Generator().manual_seed(seed)
    count = len(logits) * 2 // 3
    return laid_out(torch.randint(len(logits), (count,), generator=generator), layout)


def classification_margin(small: bool = False) -> Iterator[Checked]:
    """The margin with and without a norm, on the host and on the device."""
    norms = itertools.cycle((None, 3.5, -200.0, 90.0, 2000.0, -2000.0))
    for logits, label, seed in logits_of(small):
        target = target_for(logits, seed, LAYOUTS[seed % 4])
        norm, result = next(norms), expected.result_dtype(logits.dtype)
        on_device = norm is not None and seed % 2 == 0
        yield margin_case(logits, target, norm, on_device, f"{label} {norm} {result}")
    for logits, label in short_rows(small):
        yield margin_case(logits, target_for(logits, 0, "contiguous"), None, False, label)


def margin_case(
    logits: Tensor, target: Tensor, norm: float | None, on_device: bool, label: str
) -> Checked:
    """One classification margin."""
    result = expected.result_dtype(logits.dtype)
    log_norm = torch.tensor([norm], dtype=result) if on_device else None
    numbers: dict[str, int | float] = {"ignore_index": IGNORE}
    if norm is not None and not on_device:
        numbers["log_norm"] = norm

    def check(outputs: dict[str, Tensor]) -> None:
        wanted = expected.margins(logits, target, IGNORE, norm)
        if norm is None:
            assert_same(outputs["margin"], torch.from_numpy(wanted).to(result))
        else:
            assert_near(outputs["margin"], wanted, (2e-6, 1e-12))

    inputs = {"logits": logits, "target": target, "log_norm": log_norm}
    outputs = {"margin": (result, (len(logits),))}
    return Checked(Case("classification_margin", numbers, inputs, outputs), check, label)


def classification_margin_rival(small: bool = False) -> Iterator[Checked]:
    """The margin and the strongest wrong class of all rows, or of some."""
    norms = itertools.cycle((None, -3.5, 90.0))
    for logits, label, seed in logits_of(small):
        target = target_for(logits, seed, LAYOUTS[seed % 4])
        rows = rows_for(logits, seed, LAYOUTS[seed % 3]) if seed % 2 else None
        yield rival_case(logits, target, rows, next(norms), label)


def rival_case(
    logits: Tensor, target: Tensor, rows: Tensor | None, norm: float | None, label: str
) -> Checked:
    """One search for rivals."""
    result = expected.result_dtype(logits.dtype)
    numbers: dict[str, int | float] = {"ignore_index": IGNORE}
    if norm is not None:
        numbers["log_norm"] = norm

    def check(outputs: dict[str, Tensor]) -> None:
        wanted = expected.margins(logits, target, IGNORE, norm)
        if rows is not None:
            wanted = wanted[rows.numpy()]
        assert_near(outputs["margin"], wanted, (0, 0) if norm is None else (2e-6, 1e-12))
        assert outputs["rival"].tolist() == expected.rivals(logits, target, rows, IGNORE)

    count = len(logits if rows is None else rows)
    inputs = {"logits": logits, "target": target, "rows": rows}
    outputs = {"margin": (result, (count,)), "rival": (torch.int64, (count,))}
    return Checked(Case("classification_margin_rival", numbers, inputs, outputs), check, label)
