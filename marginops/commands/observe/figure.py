"""The figure of ``marginops observe``."""

from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

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


def draw(observation: Observation, subtitle: str) -> Figure:
    """Draw margin curves, neural collapse, class radii and the margin at scale 1.

    Args:
        observation: A training run.
        subtitle: The data set and the network.
    """
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    (margins, collapse), (radii, scaled) = figure.subplots(2, 2)
    figure.suptitle(f"A network during training\n{subtitle}", fontsize=13)
    reports = observation.reports
    _draw_margins(margins, reports)
    _draw_collapse(collapse, reports)
    _draw_radii(radii, observation)
    _draw_scaled(scaled, reports)
    separated = next((i for i, seen in enumerate(reports, 1) if seen.training_error == 0), None)
    for axes in (collapse, radii):
        # The curves change most in the first epochs.
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    for axes in (collapse, radii, scaled):
        axes.set(xlabel="epoch", xlim=(1, max(2, len(reports))))
        if separated is not None:
            axes.axvline(separated, color=_GREY, linestyle=":", linewidth=1.5)
    if separated is not None:
        scaled.annotate(
            "no training errors",
            (separated, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            color=_GREY,
            fontsize=9,
        )
    for axes in (margins, collapse, radii, scaled):
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_margins(axes: Any, reports: list[EpochReport]) -> None:
    """Draw the sorted margins of a few epochs. The epochs have logarithmic steps."""
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
        ylabel="margin / product of layer norms (below 0: misclassified)",
        xlim=(0, 1),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    lowest, highest = axes.get_ylim()
    axes.set_ylim(lowest, highest + 0.4 * (highest - lowest))
    axes.legend(loc="upper right", framealpha=0.9, edgecolor="none")

    inset = axes.inset_axes((0.1, 0.72, 0.4, 0.22))
    area = [seen.distribution.area.item() for seen in reports]
    inset.plot(range(1, len(area) + 1), area, color=_GREY, linewidth=1.5)
    inset.scatter(epochs, [area[epoch - 1] for epoch in epochs], color=colors, zorder=3, s=25)
    inset.set_title("area under the curve", fontsize=9)
    inset.set_xlabel("epoch", fontsize=8)
    inset.tick_params(labelsize=8)
    inset.spines[["top", "right"]].set_visible(False)


def _draw_collapse(axes: Any, reports: list[EpochReport]) -> None:
    epochs = range(1, len(reports) + 1)
    for name, (label, color) in _COLLAPSE.items():
        values = torch.stack([getattr(seen.collapse, name) for seen in reports])
        # A logarithmic axis cannot show 0.
        values = torch.where(values > 0, values, torch.nan)
        axes.plot(epochs, values, color=color, linewidth=2, label=label)
    axes.set(
        title="Neural collapse of the last hidden layer", ylabel="0 at full collapse", yscale="log"
    )
    lowest, highest = axes.get_ylim()
    axes.set_ylim(lowest * (lowest / highest) ** 0.5, highest)
    axes.legend(loc="lower left", fontsize=9, framealpha=0.9, edgecolor="none")


def _draw_radii(axes: Any, observation: Observation) -> None:
    history = observation.inversion.history
    inversions = observation.inversions
    epochs = range(1, len(history) + 1)
    colors = colormaps["tab10" if len(inversions) <= 10 else "tab20"]
    for label, (radius, inversion) in enumerate(zip(history.T, inversions, strict=True)):
        color = colors(label % colors.N)
        axes.plot(epochs, radius, color=color, linewidth=1.5, label=str(label))
        if inversion is not None:
            axes.plot(inversion, radius[inversion - 1], "o", color=color, markeredgecolor="black")
    axes.set(
        title="Radius of every class on the unit sphere (dots: inversion)",
        ylabel="gyration radius",
    )
    axes.legend(
        title="class", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9, frameon=False
    )


def _draw_scaled(axes: Any, reports: list[EpochReport]) -> None:
    """Draw both normalised margins. Each has its own axis, and the zeros of the axes coincide."""
    epochs = range(1, len(reports) + 1)
    other = axes.twinx()
    other.spines["top"].set_visible(False)
    for side, color, line, name, formula in (
        (axes, _BLUE, "-", "tau_margin", r"$e^{-\tau} q$"),
        (other, _VERMILION, "--", "lambda_max_margin", r"$q\,/\,\|\theta\|$ of the largest rates"),
    ):
        values = torch.tensor([getattr(seen, name) for seen in reports])
        side.plot(epochs, values, line, color=color, linewidth=2)
        last = values[-1].item()
        # Before the training samples are separated, the values are much more negative.
        lowest = -0.5 * last if last > 0 else 1.1 * values.min().item()
        side.set_ylim(lowest, max(1.1 * last, 0))
        side.set_ylabel(formula, color=color)
        side.tick_params(axis="y", colors=color)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_title("Smallest margin q of the network at scale 1 (may fall)")
