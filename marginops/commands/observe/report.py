"""The table, the conclusion and the JSON report of ``marginops observe``."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ...training.epoch_report import QUANTILES, EpochReport
from ...training.recording.numbers import report_numbers
from .loop import Observation

_COLUMNS = (
    "epoch", "error", "accuracy", "area", "smallest", "NC1", "NC2 norm", "NC2 angle", "NC3", "NC4",
    "radius", "e^-tau q",
)  # fmt: skip
_WIDTHS = [max(len(name), 7) for name in _COLUMNS]


def header(observation: Observation) -> str:
    """The meaning of the columns of the table, and their names."""
    margin = "margin / layer norms" if observation.log_norm is None else "margin"
    explained = [
        "error              share of misclassified training samples",
        "accuracy           share of correctly classified test samples",
        f"area, smallest     mean and smallest {margin} of the training samples",
        "NC1 to NC4         neural collapse of the last hidden layer, 0 at full collapse",
        "radius             mean radius of the classes in that layer, on the unit sphere",
    ]
    if observation.rates is not None:
        explained.append(
            "e^-tau q           smallest margin of the network at scale 1; it may fall"
        )
    return "\n".join([*explained, "", _joined(_COLUMNS, observation)])


def line(epoch: int, seen: EpochReport, observation: Observation) -> str:
    """The line of the table for one epoch."""
    margin, collapse = seen.distribution, seen.collapse
    cells = (
        str(epoch),
        f"{100 * seen.training_error:.2f} %",
        f"{100 * seen.test_accuracy:.2f} %",
        f"{margin.area:.3g}",
        f"{margin.minimum:.3g}",
        f"{collapse.nc1:.3f}",
        f"{collapse.nc2_norm_means:.3f}",
        f"{collapse.nc2_angle_means:.3f}",
        f"{collapse.nc3:.3f}",
        f"{collapse.nc4:.4f}",
        f"{seen.manifolds.radius.mean():.4f}",
        f"{seen.tau_margin:.3g}",
    )
    return _joined(cells, observation)


def _joined(cells: Sequence[str], observation: Observation) -> str:
    """A line of the table. The last column needs rates."""
    columns = [cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    return " ".join(columns if observation.rates is not None else columns[:-1])


def conclusion(observation: Observation) -> str:
    """The results in words: the final errors, the inversions and the stragglers."""
    last, monitor = observation.reports[-1], observation.inversion
    epochs, stragglers = observation.inversions, monitor.stragglers
    done = [f"{label} at {epoch}" for label, epoch in enumerate(epochs) if epoch is not None]
    others = [str(label) for label, epoch in enumerate(epochs) if epoch is None]
    count = len(observation.reports)
    first = monitor.first_epoch
    text = (
        f"After {count} {'epoch' if count == 1 else 'epochs'} {100 * last.training_error:.2f} % of "
        f"the training samples are misclassified, and test accuracy is "
        f"{100 * last.test_accuracy:.2f} %.\nThe inversion of a class is the first epoch from "
        f"{first} on in which its radius does not fall: "
    )
    if count < first:
        text += f"not looked for, because the training ended in epoch {count}."
    else:
        text += f"class {', '.join(done)}" if done else "no class"
        text += f"; not yet class {', '.join(others)}." if done and others else "."
    if stragglers is not None:
        text += (
            f"\n{stragglers.sum()} of {len(stragglers):,} training samples are stragglers, "
            "misclassified at the inversion of their class."
        )
    return text


def report(observation: Observation, options: argparse.Namespace) -> dict[str, Any]:
    """Settings and results, as values that JSON can hold."""
    names = (
        "data",
        "model",
        "epochs",
        "batch_size",
        "learning_rate",
        "seed",
        "regularize",
        "threads",
    )
    stragglers = observation.inversion.stragglers
    return {
        **{name: getattr(options, name) for name in names},
        "hidden": list(options.hidden) if options.model is None else None,
        "device": str(options.device),
        "torch": torch.__version__,
        "conclusion": conclusion(observation),
        "left_out": observation.left_out,
        "rates": observation.rates,
        "inversion": observation.inversion.epoch,
        "stragglers": [] if stragglers is None else stragglers.nonzero().flatten().tolist(),
        "quantile_levels": list(QUANTILES),
        "epoch": [report_numbers(seen) for seen in observation.reports],
    }
