"""What the files of a run depend on: made at its start, compared when it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from .._version import __version__
from .reductions.base import Reduction

if TYPE_CHECKING:
    from .plan import Plan
    from .scorer import Scorer

_FORMAT = 1  # of the folder; another layout has another number


def describe_run(
    scorer: Scorer, plan: Plan, reductions: Sequence[Reduction] = (), scores: bool = True
) -> dict[str, Any]:
    """Everything that the files of a run depend on, as JSON.

    The last bits of sums and products depend on the instructions that the processor has.

    Args:
        scorer: What computes the statistics.
        plan: Which rows there are.
        reductions: What remains of all rows.
        scores: Whether the scores of all rows are written.
    """
    return {
        "format": _FORMAT,
        "marginops": __version__,
        "torch": str(torch.__version__),
        "pyarrow": pa.__version__,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "scores": scores,
        "scorer": scorer.describe(),
        "reductions": {reduction.name: reduction.describe() for reduction in reductions},
        **plan.describe(),
    }


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between the description of a folder and that of a run, in plain words."""
    there, here = dict(there), dict(here)
    files = _differences_of_files(there.pop("files", []), here.pop("files", []))
    if files:
        # Numbers of rows and lengths of batches follow from the files.
        for name in ("rows", "batch_rows"):
            there.pop(name, None)
            here.pop(name, None)
    return files + list(_differences("", there, here))


def _differences_of_files(there: list[dict[str, Any]], here: list[dict[str, Any]]) -> list[str]:
    if there == here:
        return []
    old = {file["name"]: file for file in there}
    new = {file["name"]: file for file in here}
    texts = []
    for text, names in (
        ("more", [name for name in new if name not in old]),
        ("fewer", [name for name in old if name not in new]),
        ("changed", [name for name in new if name in old and new[name] != old[name]]),
    ):
        if names:
            texts.append(f"files: {len(names):,} {text}, such as {names[0]}")
    return texts or ["files: another order"]


def _differences(name: str, there: Any, here: Any) -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            inner = f"{name} {key}" if name else key
            yield from _differences(inner, there.get(key), here.get(key))
    elif there is None and isinstance(here, dict):
        yield f"{name}: only here"
    elif here is None and isinstance(there, dict):
        yield f"{name}: only there"
    elif there != here:
        yield f"{name}: {_show(there)} there and {_show(here)} here"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_show(part) for part in value) or "none"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
