"""The figure of ``marginops demo``."""

import textwrap
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)
from torch import Tensor

from .loop import Sampling
from .noise import NoiseReport
from .report import LABELS, Results, frontier, longest, target_accuracy

# Blue, bluish green and vermilion of the palette of Okabe and Ito, which differ for every colour
# vision.
_STYLES: dict[Sampling, tuple[str, str]] = {
    "uniform": ("#0072B2", "--"),
    "stale_margin": ("#009E73", "-"),
    "minimal_margin": ("#D55E00", "-."),
}
_GREY = "#6E6E6E"
_BINS = 60


def draw(
    results: Results,
    subtitle: str,
    unit: str,
    noise: NoiseReport | None,
    is_normalized: bool = True,
) -> Figure:
    """Draw accuracy over time, accuracy over updates, and the training margins.

    Args:
        results: The runs of each sampling. Those of one budget are evaluated after the same
            updates.
        subtitle: The data set, the network and the numbers of the run.
        unit: What the times are.
        noise: What is known of flipped labels. It adds a data map.
        is_normalized: Whether the margins are divided by the product of the layers' norms.
    """
    if noise is None:
        figure = Figure(figsize=(16, 5.8), layout="constrained")
        by_time, by_update, margins = figure.subplots(1, 3, width_ratios=[1.4, 1, 1])
    else:
        figure = Figure(figsize=(14, 11), layout="constrained")
        (by_time, by_update), (margins, data_map) = figure.subplots(2, 2)
    seeds = len(longest(results["uniform"]))
    band = f"; mean and standard deviation over {seeds} seeds" if seeds > 1 else ""
    subtitle = textwrap.fill(f"{subtitle}{band}", 140 if noise is None else 120)
    figure.suptitle(f"Selection by margin and uniform sampling\n{subtitle}", fontsize=13)
    _draw_accuracy(by_time, by_update, results, unit)
    _draw_margins(margins, results, is_normalized)
    if noise is not None:
        _draw_data_map(data_map, noise)
    for axes in (by_time, by_update, margins):
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        # Below the axes, where it covers no curve.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    return figure


def _draw_accuracy(by_time: Any, by_update: Any, results: Results, unit: str) -> None:
    target = target_accuracy(results)
    lowest, highest = 1.0, 0.0
    for sampling, budgets in results.items():
        color, line = _STYLES[sampling]
        for updates, runs in budgets.items():
            final = updates == max(budgets)
            label = LABELS[sampling] if final else None
            x, seconds, mean, deviation = _curve(runs)
            for axes, position in ((by_time, seconds), (by_update, x)):
                axes.plot(
                    position,
                    mean,
                    line,
                    color=color,
                    label=label,
                    linewidth=2 if final else 1.2,
                    alpha=1 if final else 0.7,
                )
                axes.fill_between(
                    position,
                    mean - deviation,
                    mean + deviation,
                    color=color,
                    alpha=0.2,
                    linewidth=0,
                )
            # The accuracy of the first updates is much lower, and would compress a long curve.
            later = x >= (x[-1] / 10 if len(x) > 20 else 0)
            lowest = min(lowest, (mean - deviation)[later].min().item())
            highest = max(highest, (mean + deviation).max().item())
        ends = frontier(budgets)
        by_time.plot(np.exp(ends.log_costs), ends.accuracies, "o:", color=color, markersize=7)
    by_time.axhline(
        target, color="black", linewidth=1, linestyle=":", label="final accuracy of uniform"
    )
    # Minimal margin takes many times as long as the others: a linear axis would hide those.
    by_time.set_xscale("log")
    by_time.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    by_time.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    by_time.xaxis.set_minor_formatter(NullFormatter())
    by_update.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    by_update.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    by_time.set(
        title="Test accuracy against training time",
        xlabel=f"{unit} of training (thin: half of the updates; dots: frontier of finished runs)",
    )
    by_update.set(title="Test accuracy against updates", xlabel="updates (thin: half of them)")
    for axes in (by_time, by_update):
        axes.set_ylim(max(0.0, lowest - 0.01), min(1.0, highest + 0.01))
        axes.set(ylabel="test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _curve(runs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Updates, mean seconds, and mean and deviation of the accuracy, after the first update."""
    accuracy = torch.tensor([run.test_accuracy for run in runs])
    deviation, mean = torch.std_mean(accuracy, 0, correction=min(1, len(runs) - 1))
    seconds = torch.tensor([run.seconds for run in runs]).mean(0)
    # A logarithmic axis has no zero.
    return torch.tensor(runs[0].updates)[1:], seconds[1:], mean[1:], deviation[1:]


def _draw_margins(axes: Any, results: Results, is_normalized: bool) -> None:
    """Draw histograms with the same bins, over the samples of all seeds."""
    before = torch.cat([run.margins_before for run in longest(results["uniform"])])
    after = {
        sampling: torch.cat([run.margins_after for run in longest(budgets)])
        for sampling, budgets in results.items()
    }
    # A few extreme samples would compress the rest of the histogram.
    ends = torch.cat([_inner_range(margins) for margins in (before, *after.values())])
    lowest, highest = ends.min().item(), ends.max().item()
    if lowest == highest:
        lowest, highest = lowest - 0.5, highest + 0.5
    edges = torch.linspace(lowest, highest, _BINS + 1)

    share, _ = torch.histogram(before, edges)
    axes.stairs(
        share / len(before), edges, fill=True, color=_GREY, alpha=0.3, label="before training (all)"
    )
    for sampling, margins in after.items():
        color, line = _STYLES[sampling]
        share, _ = torch.histogram(margins, edges)
        axes.stairs(
            share / len(margins),
            edges,
            color=color,
            linestyle=line,
            linewidth=2,
            label=f"after {LABELS[sampling]}",
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set(
        title="Margins of the training samples",
        xlabel=f"margin{' / product of layer norms' * is_normalized}\n(below 0: misclassified)",
        ylabel="share of the training samples",
    )
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_data_map(axes: Any, noise: NoiseReport) -> None:
    noise.data_map.plot(axes, highlight=noise.flipped.nonzero().squeeze(1))
    axes.set_title("Data map of a uniform run; ring: flipped label")


def _inner_range(values: Tensor) -> Tensor:
    """The quantiles at 0.2 % and at 99.8 %."""
    ordered = values.sort().values
    last = len(ordered) - 1
    return ordered[[round(0.002 * last), round(0.998 * last)]]
