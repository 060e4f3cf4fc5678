"""Options, runs and output of the command ``marginops demo``."""

import argparse
import math
from functools import partial
from typing import Any

import torch

from ...norms import log_norm_product
from ...training import TrainingDynamics
from .. import console
from ..data import ClassificationData
from ..models import build
from ..options import (
    MOMENTUM,
    UsageError,
    add_count,
    add_data_arguments,
    add_run_arguments,
    share,
)
from ..preparation import describe, execute, finish, prepare
from .loop import Sampling, TrainingHistory, samples_an_epoch, train
from .noise import NoiseReport, find_flipped, flip_labels
from .report import LABELS, Results, conclusion, report, table

_DEFAULTS = {
    "digits": {"batch_size": 16, "updates": 1000, "hidden": (128,), "learning_rate": 0.05},
    "other": {"batch_size": 128, "updates": 3000, "hidden": (256,), "learning_rate": 0.05},
}
_WEIGHT_DECAY = 5e-4
_WARM_UP = 0.1  # the share of the updates in which the learning rate rises
_DIGITS = (
    "The digits are few: a run takes about a second, and the network learns nearly all of them by "
    "heart. They show how the demo works, not whether selection pays. --data fashion-mnist does."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops demo`` to its parser."""
    add_data_arguments(parser)
    add_count(
        parser,
        "--updates",
        "number of optimizer steps; each sampling is also run with half of them",
        _DEFAULTS,
    )
    add_count(parser, "--batch-size", "number of samples that each update trains on", _DEFAULTS)
    add_count(parser, "--candidates", "candidates per trained sample of minimal margin", 10)
    add_count(parser, "--seeds", "number of runs of each sampling and number of updates", 3)
    parser.add_argument(
        "--label-noise",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="share of the training labels that are changed at random, and then looked for with "
        "label_issues (default: %(default)s)",
    )
    add_run_arguments(
        parser,
        _DEFAULTS,
        learning_rate=f"learning rate of SGD with momentum {MOMENTUM}; it rises during the first "
        "tenth of the updates, and then a cosine lowers it to 0",
        output="marginops-demo.png",
        quiet="show no progress",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train with all samplings, print the table, write the figure, and return the exit status."""
    return execute("demo", _run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    packages = ["matplotlib", "tqdm", *(["sklearn"] if arguments.label_noise else [])]
    options, data = prepare(arguments, packages, _DEFAULTS)
    _check_numbers(data, options)

    from .figure import draw

    problem = build(data, options).norm_problem(data.train_inputs)
    samples, network = describe(data, options)
    console.say(f"{samples}; {network}, seeds: {options.seeds}, device: {options.device}")
    if problem is not None:
        console.say(f"The margins of the figure are not divided by layer norms ({problem}).")
    results, noise = compare(data, options, is_normalized=problem is None)
    unit = "CPU seconds" if options.device.type == "cpu" else "seconds"
    texts = [table(results, unit), conclusion(results, options, unit)]
    written = report(results, options, unit)
    if noise is not None:
        texts.append(noise.text())
        written["label_issues"] = noise.numbers()
    if options.data == "digits":
        texts.append(_DIGITS)
    title = f"{data.name}, {network}, updates: {options.updates:,}"
    if noise is not None:
        title += f", label noise: {options.label_noise:g}"
    return finish(
        "demo",
        options,
        "\n" + "\n\n".join(texts),
        written,
        lambda: draw(results, title, unit, noise, is_normalized=problem is None),
        150,
    )


def compare(
    data: ClassificationData, options: argparse.Namespace, is_normalized: bool
) -> tuple[Results, NoiseReport | None]:
    """Train with each sampling and number of updates, from the same first network for each seed.

    With label noise, one more uniform run of the first seed collects training dynamics. If
    ``is_normalized``, the margins of the histories are divided by the product of the layers' norms.
    """
    from tqdm import tqdm

    log_norm = partial(log_norm_product, example_input=data.train_inputs[:2])

    def run_once(
        sampling: Sampling,
        seed: int,
        updates: int,
        progress: Any,
        dynamics: TrainingDynamics | None = None,
    ) -> TrainingHistory:
        noisy, _ = flip_labels(data, options.label_noise, seed)
        torch.manual_seed(seed)
        model = build(data, options)
        optimizer = torch.optim.SGD(
            model.network.parameters(),
            lr=options.learning_rate,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=_WEIGHT_DECAY,
        )
        progress.set_description(f"seed {seed + 1}/{options.seeds}, {LABELS[sampling]}")
        with model.told():
            history = train(
                model.network,
                noisy,
                optimizer,
                updates=updates,
                batch_size=options.batch_size,
                sampling=sampling,
                candidate_ratio=options.candidates,
                head=model.head,
                scheduler=torch.optim.lr_scheduler.LambdaLR(
                    optimizer, lambda update: _factor(update, updates)
                ),
                generator=torch.Generator().manual_seed(seed),
                log_norm=log_norm if is_normalized else None,
                on_update=lambda _: progress.update(),
                dynamics=dynamics,
                skip_mislabelled=options.label_noise > 0,
            )
        if not history.margins_after.isfinite().all():
            raise UsageError(
                f"training diverged ({LABELS[sampling]}, seed {seed + 1}); lower --learning-rate"
            )
        return history

    # These runs build or load the native library and warm up PyTorch, before time is measured.
    for sampling in LABELS:
        run_once(sampling, 0, min(options.updates, 20), tqdm(disable=True))
    # Every run ends its own schedule: a long run that is cut off says nothing about a short one.
    budgets = sorted({max(1, options.updates // 2), options.updates})
    results: dict[Sampling, dict[int, list[TrainingHistory]]] = {
        sampling: {updates: [] for updates in budgets} for sampling in LABELS
    }
    total = len(LABELS) * options.seeds * sum(budgets)
    if options.label_noise:
        total += options.updates
    # None: the progress is shown on a terminal only, not in the file of a log.
    hidden = options.quiet or None
    noise = None
    with tqdm(total=total, unit=" updates", disable=hidden, dynamic_ncols=True) as progress:
        for seed in range(options.seeds):
            for sampling in LABELS:
                for updates in budgets:
                    history = run_once(sampling, seed, updates, progress)
                    results[sampling][updates].append(history)
        if options.label_noise:
            dynamics = TrainingDynamics(len(data.train_target), device=options.device)
            run_once("uniform", 0, options.updates, progress, dynamics)
            _, flipped = flip_labels(data, options.label_noise, 0)
            noise = find_flipped(dynamics, flipped)
    return results, noise


def _factor(update: int, updates: int) -> float:
    """The factor of the learning rate: a linear rise, then half a cosine, to 0 after the last."""
    rising = int(_WARM_UP * updates)
    if update < rising:
        return (update + 1) / (rising + 1)
    return (1 + math.cos(math.pi * (update - rising) / (updates - rising))) / 2


def _check_numbers(data: ClassificationData, options: argparse.Namespace) -> None:
    samples = len(data.train_target)
    if options.label_noise and not 1 <= round(options.label_noise * samples) < samples:
        raise UsageError(
            f"--label-noise: expected 0 or a share that changes some but not all of the {samples} "
            f"training labels, got {options.label_noise:g}"
        )
    if options.batch_size * options.candidates > samples:
        raise UsageError(
            f"--batch-size times --candidates: expected at most {samples}, the number of training "
            f"samples, got {options.batch_size} times {options.candidates}; lower one of the two"
        )
    visited = samples_an_epoch(samples)
    if options.batch_size > visited:
        raise UsageError(
            f"--batch-size: expected at most {visited}, the number of training samples that an "
            f"epoch of stale margins visits, got {options.batch_size}"
        )
