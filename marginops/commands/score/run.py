"""The flow of the command ``marginops score``: checks, the run, and what is told about it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import torch

from .. import console, figures, functions, output
from ..options import UsageError, is_place
from ..preparation import check_device, check_packages
from .arguments import check

_PACKAGES = ("pyarrow", "torchmetrics", "matplotlib", "fsspec", "safetensors", "tqdm")
_TORCHRUN = (("RANK", "0"), ("WORLD_SIZE", "1"))
# Seconds between two looks for the results of the other processes.
_PATIENCE = 0.5


def run(arguments: argparse.Namespace) -> int:
    """Score files, tell the results, and return the exit status."""
    try:
        check(arguments)
        check_packages(_PACKAGES, "score")
        if arguments.engine == "ray":
            check_packages(["ray"], "ray")
    except UsageError as error:
        return _fail(str(error), 2)

    from ...scoring import DataError, OutputError, WorkerError

    own = (DataError, OutputError, WorkerError, ConnectionError, console.StandardOutputError)
    options = argparse.Namespace(**vars(arguments))
    try:
        with _users_function(options, own), _arguments(options):
            return _run(options)
    # No Ray cluster raises ConnectionError.
    except (UsageError, DataError, ConnectionError) as error:
        return _fail(_with_option(str(error), options), 2)
    except (OutputError, WorkerError) as error:
        return _fail(_with_option(str(error), options), 1)
    except KeyboardInterrupt:
        console.fail(
            "marginops score: interrupted; finished tasks stay, and the same command goes on"
        )
        raise
    except (MemoryError, RuntimeError) as error:
        if not functions.is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "memory is full"
        return _fail(
            f"the run needs more memory than there is ({reason}); lower --batch-rows or --workers",
            1,
        )


def _run(options: argparse.Namespace) -> int:
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(options.device)
    _check_json(options)
    try:
        figures.load()
    except figures.FigureError as error:
        raise UsageError(str(error)) from error

    from ...scoring import score_files
    from .building import make_reductions, make_scorer
    from .progress import Progress
    from .results import tell

    scorer = make_scorer(options)
    # torchrun sets these variables.
    rank, num_processes = (int(os.environ.get(*name)) for name in _TORCHRUN)
    progress = Progress(options.select, quiet=options.quiet or rank != 0)
    try:
        summary = score_files(
            options.files,
            scorer,
            options.output,
            reductions=make_reductions(options, scorer),
            scores=options.scores,
            workers=options.workers,
            engine=options.engine,
            task_rows=options.task_rows,
            progress=progress,
            **_engine_options(options),
        )
    finally:
        progress.close()
    if rank != 0:
        return 0
    return tell(options, scorer, summary or _wait_for_others(options), progress, num_processes)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("address", "num_gpus") if options.engine == "ray" else ()
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _wait_for_others(options: argparse.Namespace) -> dict[str, Any]:
    """Wait until the process of torchrun that ends last has merged the results."""
    from ...scoring.storage import Storage

    if not options.quiet:
        console.fail("waiting for the other processes")
    storage = Storage(options.output)
    while (content := storage.read("summary.json")) is None:
        time.sleep(_PATIENCE)
    return json.loads(content)


def _check_json(options: argparse.Namespace) -> None:
    if options.json is not None:
        try:
            output.check(options.json)
        except output.OutputError as error:
            raise UsageError(f"--json: {error}") from error


@contextlib.contextmanager
def _users_function(
    options: argparse.Namespace, passing: tuple[type[Exception], ...]
) -> Iterator[None]:
    """Tell errors of the function that an option names."""
    for name in ("head", "model"):
        place = getattr(options, name)
        if place is not None and is_place(place):
            with functions.told(f"--{name}", place, passing):
                yield
            return
    yield


@contextlib.contextmanager
def _arguments(options: argparse.Namespace) -> Iterator[None]:
    """Tell errors about arguments as errors about options."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if _with_option(str(error), options) == str(error):
            raise
        raise UsageError(str(error)) from error


def _with_option(message: str, options: argparse.Namespace) -> str:
    """A message that names the option instead of the argument."""
    name, found, rest = message.partition(": expected ")
    if not found or name not in vars(options) or name == "files":
        return message
    rest = rest.replace("layer=", "--layer")
    return f"--{name.replace('_', '-')}: expected {rest}"


def _fail(message: str, status: int) -> int:
    console.fail(f"marginops score: {message}")
    return status
