"""Options and output of the command ``marginops observe``."""

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...training import RunRecorder, TrainingDynamics
from .. import console
from ..data import ClassificationData
from ..models import build
from ..options import MOMENTUM, add_count, add_data_arguments, add_run_arguments, path, whole_number
from ..preparation import describe, execute, finish, prepare
from ..report import run as page

if TYPE_CHECKING:
    from ...training import EpochReport

_DEFAULTS = {
    # The batch size is the number of digits, so that there is no noise of batches.
    "digits": {"epochs": 300, "batch_size": 1347, "hidden": (64, 64), "learning_rate": 0.1},
    "other": {"epochs": 40, "batch_size": 512, "hidden": (256, 256), "learning_rate": 0.05},
}
_LINES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops observe`` to its parser."""
    add_data_arguments(parser)
    add_count(parser, "--epochs", "number of passes over the training data", _DEFAULTS)
    add_count(parser, "--batch-size", "number of samples in each update", _DEFAULTS)
    add_run_arguments(
        parser,
        _DEFAULTS,
        learning_rate=f"learning rate of SGD with momentum {MOMENTUM}",
        output="marginops-observe.png",
        quiet="do not print the table of epochs, and show no progress of a download",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed of the network and of the batches (default: %(default)s)",
    )
    parser.add_argument(
        "--report",
        type=path,
        metavar="FILE",
        help="also write the report of marginops report, an HTML file, to this file",
    )
    parser.add_argument(
        "--regularize", action="store_true", help="add multi-margin regularization to the loss"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, print the results, write the figure, and return the exit status."""
    return execute("observe", _run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    options, data = prepare(arguments, ["matplotlib", "scipy", "torchmetrics", "tqdm"], _DEFAULTS)

    if options.report is not None:
        page.check("--report", options.report)

    from .figure import draw
    from .loop import begin, watch
    from .report import conclusion, header, line, report

    torch.manual_seed(options.seed)
    observation = begin(build(data, options), data)
    samples, network = describe(data, options)
    if options.regularize:
        network += ", multi-margin regularization"
    console.say(f"{samples}; {network}, seed {options.seed}, device: {options.device}")
    for sentence in observation.left_out:
        console.say(sentence)
    if not options.quiet:
        console.say(f"\n{header(observation)}")

    def show(epoch: int, seen: "EpochReport") -> None:
        step = math.ceil(options.epochs / _LINES)
        if not options.quiet and (epoch % step == 0 or epoch in (1, options.epochs)):
            console.say(line(epoch, seen, observation))

    with tempfile.TemporaryDirectory() as folder:
        recorder = None
        if options.report is not None:
            recorder = RunRecorder(
                folder,
                TrainingDynamics(len(data.train_target), device=options.device),
                name=f"marginops observe: {network}",
                data=data.name,
            )
        watch(observation, data, options, show, recorder)
        status = finish(
            "observe",
            options,
            f"\n{conclusion(observation)}\n",
            report(observation, options),
            lambda: draw(observation, f"{data.name}, {network}"),
            90,
        )
        if options.report is None:
            return status
        written = page.write("observe", "--report", options.report, Path(folder), _pictures(data))
        return max(status, written)


def _pictures(data: ClassificationData) -> Callable[[int], Tensor] | None:
    """What shows the training samples, if they are pictures."""
    is_picture = data.train_inputs.dim() == 4 and data.train_inputs.shape[1] in (1, 3)
    return data.train_inputs.__getitem__ if is_picture else None
