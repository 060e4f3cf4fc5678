"""The table, the conclusion and the JSON report of ``marginops demo``."""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...training.comparison.frontier import Frontier
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
_ROUNDING = 1e-9
Budgets = Mapping[int, Sequence[TrainingHistory]]
"""The runs of one sampling, one for each seed, by their numbers of updates."""
Results = Mapping[Sampling, Budgets]


def target_accuracy(results: Results) -> float:
    """The mean accuracy at the end of the longest uniform runs."""
    return statistics.fmean(run.test_accuracy[-1] for run in longest(results["uniform"]))


def frontier(budgets: Budgets) -> Frontier:
    """The accuracy at the end of the runs against their time, over all budgets.

    Every run ends its own schedule. A point inside a run would be one of a run that is cut off.
    """
    groups = list(budgets.values())
    # The logarithm of a time of 0 is no number.
    costs = np.array([[max(run.seconds[-1], 1e-9) for run in runs] for runs in groups])
    accuracies = np.array([[run.test_accuracy[-1] for run in runs] for runs in groups])
    return Frontier(costs.T, accuracies.T)


def time_to_reach(accuracy: float, budgets: Budgets) -> float | None:
    """The time of a run that ends with an accuracy; None if no budget reaches it.

    Between two budgets the accuracy is linear in the logarithm of the time. If the smallest budget
    reaches more already, the result is its time.
    """
    line = frontier(budgets)
    if accuracy > line.accuracies[-1] + _ROUNDING:
        return None
    return float(np.exp(line.log_cost(np.array(accuracy))))


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
            f"to {100 * target:.2f} %",
        ),
        *(
            (
                LABELS[sampling],
                f"{updates:,}",
                f"{_mean_and_deviation([100 * run.test_accuracy[-1] for run in runs])} %",
                f"{runs[0].samples_trained:,}",
                f"{runs[0].samples_scored:,}",
                _mean_and_deviation([run.seconds[-1] for run in runs]),
                _seconds(time_to_reach(target, budgets)) if updates == max(budgets) else "",
            )
            for sampling, budgets in results.items()
            for updates, runs in budgets.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def conclusion(results: Results, options: argparse.Namespace, unit: str) -> str:
    """The results in words, for any winner: a line for the baseline and for each other sampling."""
    target = target_accuracy(results)
    baseline = time_to_reach(target, results["uniform"])
    assert baseline is not None
    updates = max(results["uniform"])
    left_out = " and leave out what looks mislabelled" if options.label_noise else ""
    costs: dict[Sampling, str] = {
        "stale_margin": f"Stale margins score nothing{left_out}.",
        "minimal_margin": f"Minimal margin scores {options.candidates} candidates for each trained "
        "sample.",
    }
    lines = [
        f"Uniform sampling reaches {100 * target:.2f} % test accuracy in {baseline:.2f} {unit}, "
        f"with at most {updates:,} {'update' if updates == 1 else 'updates'}."
    ]
    for sampling, cost in costs.items():
        time = time_to_reach(target, results[sampling])
        if time is None:
            text = "not reached"
        elif time <= baseline:
            text = f"{time:.2f}, {baseline / time:.1f} times as fast"
        else:
            text = f"{time:.2f}, {time / baseline:.1f} times as long"
        verdict = _verdict(results, sampling, target, baseline)
        lines.append(f"{LABELS[sampling].capitalize()}: {text}. {verdict} {cost}")
    lines.append(
        "Every run lets its learning rate fall to 0. Times between the two numbers of updates are "
        "interpolated."
    )
    return "\n".join(lines)


def report(results: Results, options: argparse.Namespace, unit: str) -> dict[str, Any]:
    """Settings and results, as values that JSON can hold."""
    names = (
        *("data", "model", "updates", "batch_size", "candidates", "learning_rate", "label_noise"),
        "threads",
    )
    levels = torch.tensor([0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
    target = target_accuracy(results)
    return {
        **{name: getattr(options, name) for name in names},
        "hidden": list(options.hidden) if options.model is None else None,
        "device": str(options.device),
        "torch": torch.__version__,
        "unit": unit,
        "conclusion": conclusion(results, options, unit),
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
    uniform, other = results["uniform"], results[sampling]
    above, below = time_to_reach(target + spread, other), time_to_reach(target - spread, other)
    text = f"the spread over the seeds ({100 * spread:.2f} points)"
    if above is not None and above < baseline and not _is_bound(target, uniform):
        return f"This is more than {text}, so {_WINS[sampling]}."
    if below is None or (below > baseline and not _is_bound(target - spread, other)):
        return f"This is more than {text}, so {_WINS['uniform']}."
    reached = time_to_reach(target, other) is not None
    if reached and (_is_bound(target, uniform) or _is_bound(target, other)):
        return "Half of the updates are enough: lower --updates to see who is faster."
    return f"This is within {text}, so there is no clear winner."


def _is_bound(accuracy: float, budgets: Budgets) -> bool:
    """Whether the smallest budget reaches more already, so that the time may be a smaller one."""
    return bool(frontier(budgets).accuracies[0] > accuracy + _ROUNDING)


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
