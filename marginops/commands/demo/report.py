"""The table, the conclusion and the JSON report of ``marginops demo``."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .loop import Sampling, TrainingHistory

LABELS: dict[Sampling, str] = {"uniform": "uniform", "minimal_margin": "minimal margin"}
Results = Mapping[Sampling, Sequence[TrainingHistory]]


def table(results: Results) -> str:
    """The table of results, one line per sampling, mean and standard deviation over the seeds."""
    rows = [
        ("sampling", "test accuracy", "updates", "back-propagated", "scored", "seconds"),
        *(
            (
                LABELS[sampling],
                f"{_mean_and_deviation([100 * run.test_accuracy[-1] for run in runs])} %",
                f"{runs[0].updates[-1]:,}",
                f"{runs[0].samples_trained:,}",
                f"{runs[0].samples_scored:,}",
                _mean_and_deviation([run.seconds[-1] for run in runs]),
            )
            for sampling, runs in results.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def conclusion(results: Results, candidate_ratio: int) -> str:
    """The results in words, for any winner."""
    accuracy = {
        sampling: [100 * run.test_accuracy[-1] for run in runs]
        for sampling, runs in results.items()
    }
    seconds = {
        sampling: statistics.fmean(run.seconds[-1] for run in runs)
        for sampling, runs in results.items()
    }
    uniform, selected = (statistics.fmean(accuracy[sampling]) for sampling in LABELS)
    difference = selected - uniform
    updates = results["uniform"][0].updates[-1]
    spread = max(map(_deviation, accuracy.values()))
    if len(accuracy["uniform"]) == 1:
        verdict = "One seed does not show whether this is more than chance."
    elif abs(difference) <= spread:
        verdict = (
            f"This is within the spread over the seeds ({spread:.2f} points), so there is no clear "
            "winner."
        )
    else:
        winner = "minimal-margin selection" if difference > 0 else "uniform sampling"
        verdict = (
            f"This is more than the spread over the seeds ({spread:.2f} points), so {winner} wins."
        )
    factor = seconds["minimal_margin"] / seconds["uniform"]
    return (
        f"After {updates:,} {'update' if updates == 1 else 'updates'}, minimal-margin selection "
        f"reached {selected:.2f} % test accuracy and uniform sampling reached {uniform:.2f} %. "
        f"The difference is {difference:+.2f} points. {verdict} Selection scored "
        f"{candidate_ratio} candidates per trained sample and took {factor:.1f} times as long."
    )


def report(results: Results, options: argparse.Namespace) -> dict[str, Any]:
    """Settings and results, as values that JSON can hold."""
    settings = {
        name: getattr(options, name)
        for name in ("data", "updates", "batch_size", "candidates", "learning_rate", "threads")
    }
    levels = torch.tensor([0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
    return {
        **settings,
        "hidden": list(options.hidden),
        "device": str(options.device),
        "torch": torch.__version__,
        "conclusion": conclusion(results, options.candidates),
        "quantile_levels": [round(level, 2) for level in levels.tolist()],
        "runs": [
            {
                "sampling": sampling,
                "seed": seed,
                "updates": run.updates,
                "seconds": run.seconds,
                "test_accuracy": run.test_accuracy,
                "samples_trained": run.samples_trained,
                "samples_scored": run.samples_scored,
                "margin_quantiles_before": run.margins_before.quantile(levels).tolist(),
                "margin_quantiles_after": run.margins_after.quantile(levels).tolist(),
            }
            for sampling, runs in results.items()
            for seed, run in enumerate(runs)
        ],
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {_deviation(values):.2f}" if len(values) > 1 else mean
