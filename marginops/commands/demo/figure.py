"""The figure of ``marginops demo``."""

import textwrap
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from torch import Tensor

from .loop import Sampling
from .report import Results

# Blue and vermilion of the palette of Okabe and Ito, which differ for every colour vision.
_STYLES: dict[Sampling, tuple[str, str, str]] = {
    "uniform": ("uniform sampling", "#0072B2", "--"),
    "minimal_margin": ("minimal-margin selection", "#D55E00", "-"),
}
_GREY = "#6E6E6E"
_BINS = 60


def draw(results: Results, subtitle: str) -> Figure:
    """Draw accuracy over updates, accuracy over seconds, and the training margins.

    Args:
        results: The runs of each sampling, all evaluated after the same updates.
        subtitle: The data set, the network and the numbers of the run.
    """
    figure = Figure(figsize=(15, 5.6), layout="constrained")
    by_update, by_second, margins = figure.subplots(1, 3)
    seeds = len(results["uniform"])
    band = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    subtitle = textwrap.fill(f"{subtitle}{band}", 140)
    figure.suptitle(f"Minimal-margin selection and uniform sampling\n{subtitle}", fontsize=13)
    lowest, highest = 1.0, 0.0
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
        # The accuracy of the first updates is much lower, and would compress a long curve.
        later = updates >= (updates[-1] / 20 if len(updates) > 20 else 0)
        lowest = min(lowest, (mean - deviation)[later].min().item())
        highest = max(highest, (mean + deviation).max().item())
    by_update.set(title="Test accuracy for the same number of updates", xlabel="updates")
    by_second.set(title="Test accuracy for the same time", xlabel="training time in seconds")
    by_update.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    by_update.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    for axes in (by_update, by_second):
        axes.set_ylim(max(0.0, lowest - 0.01), min(1.0, highest + 0.01))
        axes.set(ylabel="test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    _draw_margins(margins, results)
    for axes in (by_second, margins):
        axes.xaxis.set_major_locator(MaxNLocator(6))
    for axes in (by_update, by_second, margins):
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Below the axes, where it covers no curve.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    return figure


def _draw_margins(axes: Any, results: Results) -> None:
    """Draw histograms with the same bins, over the samples of all seeds."""
    before = torch.cat([run.margins_before for run in results["uniform"]])
    after = {
        sampling: torch.cat([run.margins_after for run in runs])
        for sampling, runs in results.items()
    }
    # A few extreme samples would compress the rest of the histogram.
    ends = torch.cat([_inner_range(margins) for margins in (before, *after.values())])
    lowest, highest = ends.min().item(), ends.max().item()
    if lowest == highest:
        lowest, highest = lowest - 0.5, highest + 0.5
    edges = torch.linspace(lowest, highest, _BINS + 1)

    share, _ = torch.histogram(before, edges)
    axes.stairs(
        share / len(before),
        edges,
        fill=True,
        color=_GREY,
        alpha=0.3,
        label="before training (both)",
    )
    for sampling, margins in after.items():
        label, color, line = _STYLES[sampling]
        share, _ = torch.histogram(margins, edges)
        axes.stairs(
            share / len(margins),
            edges,
            color=color,
            linestyle=line,
            linewidth=2,
            label=f"after {label}",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set(
        title="Margins of the training samples",
        xlabel="margin / product of layer norms\n(below 0: misclassified)",
        ylabel="share of the training samples",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _inner_range(values: Tensor) -> Tensor:
    """The quantiles at 0.2 % and at 99.8 %."""
    ordered = values.sort().values
    last = len(ordered) - 1
    return ordered[[round(0.002 * last), round(0.998 * last)]]
