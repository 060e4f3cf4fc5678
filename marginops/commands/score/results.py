"""The results of ``marginops score``: what is printed, the figure, and the file of ``--json``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import torch

from ..._json import json_bytes
from ..._version import __version__
from ...scoring import OutputError
from ...scoring.storage import Storage
from .. import console, figures, output
from .figure import draw
from .progress import Progress
from .summary import sentences, speed

if TYPE_CHECKING:
    from ...scoring import Scorer

_FIGURE = "figure.png"
_DPI = 100
_SETTINGS = ("files", "output", "head", "layer", "model", "column", "target", "id", "engine")


def tell(
    options: argparse.Namespace,
    scorer: Scorer,
    summary: Mapping[str, Any],
    progress: Progress,
    num_processes: int,
) -> int:
    """Print the results, write the figure and the file of ``--json``, and return the exit status.

    Each is written whatever becomes of the other.
    """
    for paragraph in sentences(summary):
        console.say(f"{paragraph}\n")
    if progress.rows:
        who = f"process 0 of {num_processes}: " if num_processes > 1 else ""
        console.say(f"{who}{speed(progress.rows, progress.seconds, progress.rates)}\n")
    storage = Storage(options.output)
    written = [f"{options.output}/{name}" for name in _names(summary, options.scores)]
    failed = []
    try:
        storage.write(_FIGURE, _figure(storage, summary, options))
        written.append(f"{options.output}/{_FIGURE}")
    except Exception as error:
        failed.append(f"{options.output}/{_FIGURE} cannot be written: {_reason(error)}")
    if options.json is not None:
        report = _report(options, scorer, summary, progress)
        try:
            output.write(options.json, json_bytes(report))
            written.append(str(options.json))
        except OSError as error:
            failed.append(f"--json: {options.json} cannot be written: {_reason(error)}")
    for line in failed:
        console.fail(f"marginops score: {line}")
    console.say("\n".join(f"wrote {name}" for name in written))
    return 1 if failed else 0


def _names(summary: Mapping[str, Any], scores: bool) -> Iterator[str]:
    """The files of the run, but for the figure."""
    names = ("selection", "selection_per_class", "label_issues", "moments", "margins")
    yield from (f"{name}.parquet" for name in names if name in summary)
    if scores:
        yield f"scores/part-*.parquet ({summary['tasks']:,} files)"
    yield "summary.json"


def _figure(storage: Storage, summary: Mapping[str, Any], options: argparse.Namespace) -> bytes:
    with storage.open_input("margins.parquet") as file:
        bins = pq.read_table(file)
    source = f"column {options.column}"
    for name in ("head", "model"):
        if getattr(options, name) is not None:
            source += f", {name} {getattr(options, name)}"
    files = f"{summary['files']:,} {'file' if summary['files'] == 1 else 'files'}"
    return figures.render(lambda: draw(summary, bins, f"{files}, {source}"), "png", _DPI)


def _report(
    options: argparse.Namespace,
    scorer: Scorer,
    summary: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Settings, times and the summary, as values that JSON can hold."""
    rows_per_second, bytes_per_second = progress.rates or (None, None)
    return {
        **{name: getattr(options, name) for name in _SETTINGS},
        "device": str(scorer.device),
        "marginops": __version__,
        "torch": torch.__version__,
        "scored_rows": progress.rows,
        "read_bytes": progress.bytes,
        "seconds": progress.seconds,
        "rows_per_second": rows_per_second,
        "bytes_per_second": bytes_per_second,
        "summary": summary,
    }


def _reason(error: Exception) -> str:
    if isinstance(error, OutputError):
        return str(error)
    return getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
