"""Options, runs and output of the command ``marginops demo``."""

import argparse
from typing import Any

import torch

from ...norms import log_norm_product
from .. import console
from ..data import ClassificationData
from ..options import MOMENTUM, UsageError, add_count, add_data_arguments, add_run_arguments
from ..preparation import describe, execute, finish, mlp, prepare
from .loop import Sampling, TrainingHistory, train
from .report import LABELS, Results, conclusion, report, table

_DEFAULTS = {
    "digits": {"batch_size": 16, "updates": 1000, "hidden": (128,), "learning_rate": 0.05},
    "fashion-mnist": {"batch_size": 64, "updates": 3000, "hidden": (256,), "learning_rate": 0.05},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops demo`` to its parser."""
    add_data_arguments(parser, _DEFAULTS)
    add_count(parser, "--updates", "number of optimizer steps of each run", _DEFAULTS)
    add_count(parser, "--batch-size", "number of samples that each update trains on", _DEFAULTS)
    add_count(parser, "--candidates", "number of candidates scored per trained sample", 10)
    add_count(parser, "--seeds", "number of runs of each sampling", 3)
    add_run_arguments(
        parser,
        _DEFAULTS,
        learning_rate=f"learning rate of SGD with momentum {MOMENTUM}; a cosine lowers it to 0",
        output="marginops-demo.png",
        quiet="show no progress",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train with both samplings, print the table, write the figure, and return the exit status."""
    return execute("demo", _run, arguments)


def _run(arguments: argparse.Namespace) -> int:
    options, data = prepare(arguments, ["matplotlib", "tqdm"], _DEFAULTS)
    _check_candidates(data, options)

    from .figure import draw

    samples, network = describe(data, options)
    console.say(f"{samples}; {network}, seeds: {options.seeds}, device: {options.device}")
    results = compare(data, options)
    return finish(
        "demo",
        options,
        f"\n{table(results)}\n\n{conclusion(results, options.candidates)}",
        report(results, options),
        lambda: draw(results, f"{data.name}, {network}, updates: {options.updates:,}"),
        150,
    )


def compare(data: ClassificationData, options: argparse.Namespace) -> Results:
    """Train with both samplings, from the same initial network for each seed."""
    from tqdm import tqdm

    def run_once(sampling: Sampling, seed: int, updates: int, progress: Any) -> TrainingHistory:
        torch.manual_seed(seed)
        model = mlp(data, options.hidden).to(options.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=MOMENTUM)
        return train(
            model,
            data,
            optimizer,
            updates=updates,
            batch_size=options.batch_size,
            sampling=sampling,
            candidate_ratio=options.candidates,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates),
            generator=torch.Generator().manual_seed(seed),
            log_norm=log_norm_product,
            on_update=lambda _: progress.update(),
        )

    # These runs build or load the native library and warm up PyTorch, before time is measured.
    for sampling in LABELS:
        run_once(sampling, 0, min(options.updates, 20), tqdm(disable=True))
    results: dict[Sampling, list[TrainingHistory]] = {sampling: [] for sampling in LABELS}
    total = len(LABELS) * options.seeds * options.updates
    # None: the progress is shown on a terminal only, not in the file of a log.
    hidden = options.quiet or None
    with tqdm(total=total, unit=" updates", disable=hidden, dynamic_ncols=True) as progress:
        for seed in range(options.seeds):
            for sampling in LABELS:
                progress.set_description(f"seed {seed + 1}/{options.seeds}, {LABELS[sampling]}")
                history = run_once(sampling, seed, options.updates, progress)
                if not history.margins_after.isfinite().all():
                    raise UsageError(
                        f"training diverged ({LABELS[sampling]}, seed {seed + 1}); "
                        "lower --learning-rate"
                    )
                results[sampling].append(history)
    return results


def _check_candidates(data: ClassificationData, options: argparse.Namespace) -> None:
    candidates = options.batch_size * options.candidates
    if candidates > len(data.train_target):
        raise UsageError(
            f"--batch-size times --candidates: expected at most {len(data.train_target)}, the "
            f"number of training samples, got {options.batch_size} times {options.candidates}; "
            "lower one of the two"
        )
