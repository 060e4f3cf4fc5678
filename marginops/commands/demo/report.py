"""The table, the conclusion and the JSON report of ``marginops demo``."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .loop import Sampling, TrainingHistory

LABELS: dict[Sampling, str] = {
    "uniform": "uniform",
    "stale_margin": "stale margins",
    "minimal_margin": "minimal margin",
}
_WINS: dict[Sampling, str] = {
    "uniform": "uniform sampling wins",
    "stale_margin": "stale margins win",
    "minimal_margin": "minimal margin wins",
}
Budgets = Mapping[int, Sequence[TrainingHistory]]
"""The runs of one sampling, one for each seed, by their numbers of updates."""
Results = Mapping[Sampling, Budgets]


class Curve(NamedTuple):
    """The means over the seeds at every evaluation of one budget."""

    seconds: list[float]
    accuracy: list[float]


def mean_curve(runs: Sequence[TrainingHistory]) -> Curve:
    """The mean time and accuracy at every evaluation."""
    return Curve(
        [statistics.fmean(values) for values in zip(*(run.seconds for run in runs), strict=True)],
        [
            statistics.fmean(values)
            for values in zip(*(run.test_accuracy for run in runs), strict=True)
        ],
    )


def target_accuracy(results: Results) -> float:
    """The final accuracy of the longest uniform runs."""
    return mean_curve(longest(results["uniform"])).accuracy[-1]


def time_to_reach(accuracy: float, budgets: Budgets) -> float | None:
    """The time of the first evaluation at which a budget reaches an accuracy; None if none does."""
    times = [
        seconds
        for runs in budgets.values()
        for seconds, reached in zip(*mean_curve(runs), strict=True)
        if reached >= accuracy
    ]
    return min(times, default=None)


def table(results: Results, unit: str) -> str:
    """The table of results, one line per sampling and budget.

    Args:
        results: The runs.
        unit: What the times are: ``"CPU seconds"`` or ``"seconds"``.
    """
    target = target_accuracy(results)
    rows = [
        (
            *("sampling", "updates", "test accuracy", "back-propagated", "scored", unit),
            f"until {100 * target:.2f} %",
        ),
        *(
            (
                LABELS[sampling],
                f"{updates:,}",
                f"{_mean_and_deviation([100 * run.test_accuracy[-1] for run in runs])} %",
                f"{runs[0].samples_trained:,}",
                f"{runs[0].samples_scored:,}",
                _mean_and_deviation([run.seconds[-1] for run in runs]),
                _seconds(time_to_reach(target, {updates: runs})),
            )
            for sampling, budgets in results.items()
            for updates, runs in budgets.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def conclusion(results: Results, candidate_ratio: int, unit: str) -> str:
    """The results in words, for any winner: a line for the baseline and for each other sampling."""
    target = target_accuracy(results)
    baseline = time_to_reach(target, results["uniform"])
    assert baseline is not None
    updates = max(results["uniform"])
    lines = [
        f"Uniform sampling ends at {100 * target:.2f} % test accuracy after {updates:,} "
        f"{'update' if updates == 1 else 'updates'}. It first reached this accuracy after "
        f"{baseline:.2f} {unit}."
    ]
    for sampling, cost in (
        ("stale_margin", "They score nothing."),
        ("minimal_margin", f"It scores {candidate_ratio} candidates for each trained sample."),
    ):
        time = time_to_reach(target, results[sampling])
        if time is None:
            text = "did not reach it"
        elif time <= baseline:
            text = f"reached it after {time:.2f}: {baseline / max(time, 1e-9):.1f} times as fast"
        else:
            text = f"reached it after {time:.2f}: {time / max(baseline, 1e-9):.1f} times as long"
        verdict = _verdict(results, sampling, target, baseline)
        lines.append(f"{LABELS[sampling].capitalize()} {text}. {verdict} {cost}")
    return "\n".join(lines)


def report(results: Results, options: argparse.Namespace, unit: str) -> dict[str, Any]:
    """Settings and results, as values that JSON can hold."""
    names = (
        *("data", "updates", "batch_size", "candidates", "learning_rate", "label_noise"),
        "threads",
    )
    levels = torch.tensor([0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
    target = target_accuracy(results)
    return {
        **{name: getattr(options, name) for name in names},
        "hidden": list(options.hidden),
        "device": str(options.device),
        "torch": torch.__version__,
        "unit": unit,
        "conclusion": conclusion(results, options.candidates, unit),
        "target_accuracy": target,
        "time_to_target": {
            sampling: time_to_reach(target, budgets) for sampling, budgets in results.items()
        },
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
            for sampling, budgets in results.items()
            for runs in budgets.values()
            for seed, run in enumerate(runs)
        ],
    }


def _verdict(results: Results, sampling: Sampling, target: float, baseline: float) -> str:
    """Whether the seeds differ too much to say who is faster.

    A sampling wins if it is faster even to a target that is higher by the spread over the seeds.
    Uniform sampling wins if the other is slower even to a target that is lower by the spread.
    """
    finals = [longest(results[name]) for name in ("uniform", sampling)]
    if len(finals[0]) == 1:
        return "One seed does not show whether this is more than chance."
    spread = max(_deviation([run.test_accuracy[-1] for run in runs]) for runs in finals)
    above = time_to_reach(target + spread, results[sampling])
    below = time_to_reach(target - spread, results[sampling])
    if above is not None and above < baseline:
        winner = _WINS[sampling]
    elif below is None or below > baseline:
        winner = _WINS["uniform"]
    else:
        return (
            f"This is within the spread over the seeds ({100 * spread:.2f} points), so there is no "
            "clear winner."
        )
    return f"This is more than the spread over the seeds ({100 * spread:.2f} points), so {winner}."


def longest(budgets: Budgets) -> Sequence[TrainingHistory]:
    """The runs of the largest number of updates."""
    return budgets[max(budgets)]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {_deviation(values):.2f}" if len(values) > 1 else mean
