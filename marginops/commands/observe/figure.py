"""The figure of ``marginops observe``."""

import math
import textwrap
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)
from torch import Tensor

from ...training import EpochReport
from .loop import Observation

# The palette of Okabe and Ito, whose colours differ for every colour vision.
_BLUE, _VERMILION, _GREEN, _ORANGE, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
_GREY = "#6E6E6E"
_COLLAPSE = {
    "nc1": ("NC1: variability within classes", _BLUE),
    "nc2_norm_means": ("NC2: equal norms of the means", _VERMILION),
    "nc2_angle_means": ("NC2: equal angles of the means", _ORANGE),
    "nc3": ("NC3: distance of weight and means", _GREEN),
    "nc4": ("NC4: nearest mean and logits disagree", _PURPLE),
}
_CURVES = 6
_POINTS = 400
# A curve of fewer epochs has a dot at every epoch. A line alone does not show a single epoch.
_FEW_EPOCHS = 20


def draw(observation: Observation, subtitle: str) -> Figure:
    """Draw margin curves, neural collapse, class radii and the margin at scale 1.

    Errors take the place of the margin at scale 1 if the network has no rates.

    Args:
        observation: A training run.
        subtitle: The data set and the network.
    """
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    (margins, collapse), (radii, other) = figure.subplots(2, 2)
    figure.suptitle(f"A network during training\n{textwrap.fill(subtitle, 110)}", fontsize=13)
    reports = observation.reports
    _draw_margins(margins, observation)
    _draw_collapse(collapse, reports)
    _draw_radii(radii, observation)
    (_draw_errors if observation.rates is None else _draw_scaled)(other, reports)
    separated = next((i for i, seen in enumerate(reports, 1) if seen.training_error == 0), None)
    last = len(reports)
    for axes in (collapse, radii):
        # The curves change most in the first epochs.
        axes.set_xscale("log")
        _set_ticks(axes.xaxis, (1, 2, 5) if last < 1000 else (1,), "{x:.0f}")
    other.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    space = 0.02 * (last - 1)
    for axes, ends in (
        (collapse, (last**-0.02, last**1.02)),
        (radii, (last**-0.02, last**1.02)),
        (other, (1 - space, last + space)),
    ):
        axes.set(xlabel="epoch", xlim=ends if last > 1 else (0.8, 1.25))
        if separated is not None:
            axes.axvline(separated, color=_GREY, linestyle=":", linewidth=1.5)
    if separated is not None:
        left = separated > last / 2
        other.annotate(
            "no training errors",
            (separated, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if left else 5, 0),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            color=_GREY,
            fontsize=9,
            backgroundcolor="#FFFFFFCC",
        )
    for axes in (margins, collapse, radii, other):
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_margins(axes: Any, observation: Observation) -> None:
    """Draw the sorted margins of a few epochs. The epochs have logarithmic steps."""
    reports = observation.reports
    is_divided = observation.log_norm is None
    steps = torch.logspace(0, torch.tensor(len(reports)).log10().item(), _CURVES)
    epochs = sorted({round(step) for step in steps.tolist()})
    # The few largest margins would compress the rest of the curve.
    share = torch.linspace(0, 0.995, _POINTS)
    colors = colormaps["viridis_r"](torch.linspace(0.05, 1, len(epochs)).tolist())
    for epoch, color in zip(epochs, colors, strict=True):
        ordered = reports[epoch - 1].margins.sort().values
        ranks = (share * (len(ordered) - 1)).long()
        axes.plot(share, ordered[ranks], color=color, linewidth=2, label=f"epoch {epoch}")
    axes.axhline(0, color="black", linewidth=1)
    axes.set(
        title="Margins of the training samples, sorted",
        xlabel="rank, as a share of the samples",
        ylabel=f"margin{' / product of layer norms' * is_divided}\n(below 0: misclassified)",
        xlim=(0, 1),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    # The upper part holds the other curve and the legend.
    lowest, highest = axes.get_ylim()
    axes.set_ylim(lowest, lowest + (highest - lowest) / 0.6)
    axes.legend(loc="upper right", ncols=2, fontsize=9, frameon=False, columnspacing=1)

    inset = axes.inset_axes((0.14, 0.75, 0.32, 0.18))
    area = [seen.distribution.area.item() for seen in reports]
    inset.plot(range(1, len(area) + 1), area, color=_GREY, linewidth=1.5)
    inset.scatter(epochs, [area[epoch - 1] for epoch in epochs], color=colors, zorder=3, s=25)
    inset.set_title("area under the curve", fontsize=9)
    inset.set_xlabel("epoch", fontsize=8, labelpad=0)
    inset.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    inset.yaxis.set_major_locator(MaxNLocator(3))
    inset.tick_params(labelsize=8)
    inset.spines[["top", "right"]].set_visible(False)


def _draw_collapse(axes: Any, reports: list[EpochReport]) -> None:
    axes.set_yscale("log")
    for name, (label, color) in _COLLAPSE.items():
        values = torch.stack([getattr(seen.collapse, name) for seen in reports])
        # A logarithmic axis cannot show 0.
        values = torch.where((values > 0) & values.isfinite(), values, torch.nan)
        _plot(axes, values, color=color, linewidth=2, label=label)
    axes.set(title="Neural collapse of the last hidden layer", ylabel="0 at full collapse")
    lowest, highest = axes.get_ylim() if axes.dataLim.minposy < math.inf else (0.1, 1.0)
    lowest *= (lowest / highest) ** 0.5
    axes.set_ylim(lowest, highest)
    _set_ticks(axes.yaxis, (1, 2, 5) if highest / lowest < 1000 else (1,), "{x:g}")
    axes.legend(loc="lower left", fontsize=9, framealpha=0.9, edgecolor="none")


def _draw_radii(axes: Any, observation: Observation) -> None:
    history = observation.inversion.history
    inversions = observation.inversions
    colors = colormaps["tab10" if len(inversions) <= 10 else "tab20"]
    for label, (radius, inversion) in enumerate(zip(history.T, inversions, strict=True)):
        color = colors(label % colors.N)
        _plot(axes, radius, color=color, linewidth=1.5, label=str(label))
        if inversion is not None:
            axes.plot(inversion, radius[inversion - 1], "o", color=color, markeredgecolor="black")
    axes.set(
        title="Radius of every class on the unit sphere (dots: inversion)",
        ylabel="gyration radius",
    )
    axes.legend(
        title="class",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        ncols=math.ceil(len(inversions) / 16),
        fontsize=9,
        frameon=False,
    )


def _draw_errors(axes: Any, reports: list[EpochReport]) -> None:
    training = torch.tensor([seen.training_error for seen in reports])
    test = torch.tensor([1 - seen.test_accuracy for seen in reports])
    _plot(axes, training, color=_BLUE, linewidth=2, label="training samples")
    _plot(axes, test, color=_VERMILION, linewidth=2, linestyle="--", label="test samples")
    axes.set(title="Misclassified samples", ylabel="share")
    # The legend lies above the curves.
    axes.set_ylim(0, 1.2 * max(training.max().item(), test.max().item()) or 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(loc="upper right", ncols=2, fontsize=9, frameon=False)


def _draw_scaled(axes: Any, reports: list[EpochReport]) -> None:
    """Draw both normalised margins. Each has its own axis, and the zeros of the axes coincide."""
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    ends = []
    for side, color, line, name, formula in (
        (axes, _BLUE, "-", "tau_margin", r"$e^{-\tau} q$"),
        (other, _VERMILION, "--", "lambda_max_margin", r"$q\,/\,\|\theta\|$ of the largest rates"),
    ):
        values = torch.tensor([getattr(seen, name) for seen in reports])
        _plot(side, values, linestyle=line, color=color, linewidth=2)
        side.set_ylabel(formula, color=color)
        side.tick_params(axis="y", colors=color)
        ends.append(_ends(values))
    # The share of each axis below 0: the larger of both, so that nothing is cut off.
    below = max(-lowest / (highest - lowest) for lowest, highest in ends)
    for side, (lowest, highest) in zip((axes, other), ends, strict=True):
        height = max(-lowest / below if below else 0, highest / (1 - below) if below < 1 else 0)
        side.set_ylim(-below * height, (1 - below) * height)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_title("Smallest margin q of the network at scale 1 (may fall)")


def _ends(values: Tensor) -> tuple[float, float]:
    """The ends of an axis that shows 0 and these values."""
    values = values[values.isfinite()]
    if not values.any():
        return -1.0, 1.0
    highest = max(1.1 * values.max().item(), 0.0)
    if values[-1] > 0:
        # Before the training samples are separated, the values are much more negative.
        return -0.45 * highest, highest
    return min(1.1 * values.min().item(), 0.0), highest


def _plot(axes: Any, values: Tensor, **style: Any) -> None:
    """Draw values over the epochs from 1 on."""
    style["marker"] = "." if len(values) < _FEW_EPOCHS else ""
    axes.plot(range(1, len(values) + 1), values, **style)


def _set_ticks(axis: Any, steps: tuple[int, ...], format: str) -> None:
    """Set ticks at these multiples of the powers of ten, with plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps, numticks=10))
    axis.set_major_formatter(StrMethodFormatter(format))
    axis.set_minor_formatter(NullFormatter())
