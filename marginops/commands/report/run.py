"""Options and output of the command ``marginops report``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...training.recording import folder as folders
from .. import console, functions, output
from ..options import UsageError, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops report`` to its parser."""
    parser.add_argument(
        "folder", type=path, metavar="FOLDER", help="the folder of marginops.training.RunRecorder"
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("report.html"),
        metavar="FILE",
        help="file of the report (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        metavar="MODULE:FUNCTION",
        help="a function that returns a text or a picture (an array [H, W], [H, W, 3] or "
        "[3, H, W]) for the index of a sample; the report shows it beside the sample",
    )
    parser.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="the names of the classes 0, 1 and so on (default: those of the run)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and return the exit status."""
    try:
        return _run(arguments)
    except UsageError as error:
        console.fail(f"marginops report: {error}")
        return 2


def check(option: str, file: Path) -> None:
    """Check that a report can be made and written, before a training that ends with one."""
    if find_spec("bokeh") is None:
        raise UsageError(
            'missing packages: bokeh; install them with: pip install "marginops[report]"'
        )
    try:
        output.check(file)
    except output.OutputError as error:
        raise UsageError(f"{option}: {error}") from error


def write(
    command: str,
    option: str,
    file: Path,
    folder: Path,
    samples: Callable[[int], Any] | None = None,
    class_names: Sequence[str] | None = None,
) -> int:
    """Write the report of the run in a folder, and return the exit status."""
    from .page import build

    try:
        recorded = folders.read(folder)
    except ValueError as error:
        raise UsageError(str(error)) from error
    content = build(recorded, samples=samples, class_names=class_names)
    try:
        output.write(file, content)
    except OSError as error:
        reason = error.strerror or error
        console.fail(f"marginops {command}: {option}: {file} cannot be written: {reason}")
        return 1
    console.say(f"wrote {file}")
    return 0


def _run(options: argparse.Namespace) -> int:
    check("--output", options.output)
    samples: Callable[[int], Any] | None = None
    if options.samples is not None:
        samples = functions.find("--samples", options.samples)
    return write("report", "--output", options.output, options.folder, samples, options.class_names)
