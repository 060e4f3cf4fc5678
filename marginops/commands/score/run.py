"""The flow of the command ``marginops score``: checks, the run, and what is told about it."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import console, figures, functions, output
from ..options import UsageError, is_place
from ..preparation import check_device, check_packages
from .arguments import check

if TYPE_CHECKING:
    from ...scoring import Reduction, Scorer

_PACKAGES = ("pyarrow", "torchmetrics", "matplotlib", "fsspec", "safetensors", "tqdm")


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

    options = argparse.Namespace(**vars(arguments))
    try:
        with _users_function(options, (DataError, OutputError, WorkerError)), _arguments(options):
            return _run(options)
    except (UsageError, DataError) as error:
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
    from .progress import Progress

    scorer = _scorer(options)
    rank, num_processes = _rank(), _num_processes()
    progress = Progress(num_processes, quiet=options.quiet or rank != 0)
    try:
        summary = score_files(
            options.files,
            scorer,
            options.output,
            reductions=_reductions(options, scorer),
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
    if summary is None:
        _wait(options)
