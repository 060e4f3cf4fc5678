"""The figure of ``marginops demo``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure  # type: ignore[import-untyped]
from matplotlib.ticker import PercentFormatter, StrMethodFormatter  # type: ignore[import-untyped]
from torch import Tensor

from .training import Sampling, TrainingHistory

# Blue and vermilion of the palette of Okabe and Ito, told apart with any colour vision.
_STYLES: dict[Sampling, tuple[str, str, str]] = {
    "uniform": ("uniform sampling", "#0072B2", "--"),
    "minimal_margin": ("minimal margin selection", "#D55E00", "-"),
}
_GREY = "#6E6E6E"


def draw(results: Mapping[Sampling, Sequence[TrainingHistory]], subtitle: str) -> Figure:
    """Accuracy against updates and against seconds, and the training margins.

    Args:
        results: For each sampling its runs, which were evaluated after the same updates.
        subtitle: What was trained on what.
    """
    figure = Figure(figsize=(15, 5), layout="constrained")
    by_update, by_second, margins = figure.subplots(1, 3)
    seeds = len(results["uniform"])
    band = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(
        f"Minimal margin selection against uniform sampling\n{subtitle}{band}", fontsize=13
    )
    lowest = 1.0
    for sampling, runs in results.items():
        label, color, line = _STYLES[sampling]
        updates = torch.tensor(runs[0].updates)
        seconds = torch.tensor([run.seconds for run in runs]).mean(0)
        accuracy = torch.tensor([run.test_accuracy for run in runs])
        mean, deviation = accuracy.mean(0), accuracy.std(0, correction=min(1, seeds - 1))
        for axes, x in ((by_update, updates), (by_second, seconds)):
            axes.plot(x, mean, line, color=color, label=label, linewidth=2)
            axes.fill_between(
                x, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0
            )
        later = updates >= updates[-1] / 20
        lowest = min(lowest, (mean - deviation)[later].min().item())
    by_update.set(title="Test accuracy for the same number of updates", xlabel="updates")
    by_second.set(title="Test accuracy for the same time", xlabel="training time in seconds")
    by_update.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (by_update, by_second):
        # The climb from chance in the first updates would flatten all that follows.
        axes.set_ylim(bottom=max(0.0, lowest - 0.01))
        axes.set(ylabel="test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    _draw_margins(margins, results)
    for axes in (by_update, by_second, margins):
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def _draw_margins(axes: Any, results: Mapping[Sampling, Sequence[TrainingHistory]]) -> None:
    """Cumulative distributions, pooled over the seeds."""
    before = torch.cat([run.margins_before for run in results["uniform"]])
    axes.plot(*_cumulative(before), ":", color=_GREY, linewidth=2, label="before training (both)")
    for sampling, runs in results.items():
        label, color, line = _STYLES[sampling]
        after = torch.cat([run.margins_after for run in runs])
        axes.plot(*_cumulative(after), line, color=color, linewidth=2, label=f"after {label}")
    axes.axvline(0, color=_GREY, linewidth=1)
    axes.set(
        title="Margins of the training samples",
        xlabel="classification margin / product of the layers' Frobenius norms",
        ylabel="share of the training samples below",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _cumulative(values: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.linspace(0, 1, 501, dtype=torch.float64)
    ordered = values.double().sort().values
    return ordered[(levels * (len(ordered) - 1)).long()], levels
