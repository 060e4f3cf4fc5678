"""The figure of ``marginops score``."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

if TYPE_CHECKING:
    import pyarrow as pa

# The palette of Okabe and Ito, whose colours differ for every colour vision.
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#6E6E6E"
_BARS = 80
_PAIRS = 12
# The share of the rows at each end that the histogram may leave out.
_TAIL = 0.002
# The room beyond the score of the last selected row, as a share of the width.
_ROOM = 0.08
# Scores that are all equal get an axis nevertheless.
_NARROWEST = 1e-6

_Floats = npt.NDArray[np.float64]


def draw(summary: Mapping[str, Any], bins: pa.Table, subtitle: str) -> Figure:
    """Draw the distribution of the score, what was selected of it, and the confused classes.

    Args:
        summary: The content of ``summary.json``, with ``margins``.
        bins: The content of ``margins.parquet``.
        subtitle: The files and the head.
    """
    issues = summary.get("label_issues", {"most_confused": []})
    pairs = issues["most_confused"][:_PAIRS]
    figure = Figure(figsize=(13 if pairs else 8, 5), layout="constrained")
    figure.suptitle(
        f"Scores of {summary['rows']['rows']:,} rows\n"
        f"{textwrap.fill(subtitle, 110 if pairs else 70)}",
        fontsize=13,
    )
    panels = figure.subplots(1, 2 if pairs else 1, squeeze=False)[0]
    _draw_scores(panels[0], summary, bins)
    for axes in panels:
        axes.grid(color="#E5E5E5")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if pairs:
        _draw_pairs(panels[1], pairs, issues["misclassified"])
        panels[1].grid(visible=False, axis="y")
    return figure


def _draw_scores(axes: Any, summary: Mapping[str, Any], bins: pa.Table) -> None:
    by = summary["margins"]["by"]
    axes.set(title=f"Distribution of {by}", xlabel=by, ylabel="share of the rows")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    if not bins.num_rows:
        axes.annotate("no row has a score", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    threshold = _threshold(summary)
    edges, shares = _histogram(bins, threshold)
    axes.stairs(shares, edges, fill=True, color=_BLUE, alpha=0.35)
    axes.stairs(shares, edges, color=_BLUE, linewidth=1.5)
    if by == "margin" and edges[0] < 0 < edges[-1]:
        axes.axvline(0, color="black", linewidth=1)
        axes.set_xlabel("margin (below 0: misclassified)")
    if threshold is not None:
        _draw_selection(axes, summary["selection"], edges)
    # The upper part holds the legend.
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.2 * shares.max()))


def _threshold(summary: Mapping[str, Any]) -> float | None:
    """The score of the last selected row, if the distribution is that of these scores."""
    selection = summary.get("selection")
    if selection is None or selection["by"] != summary["margins"]["by"]:
        return None
    return selection["last_score"]


def _draw_selection(axes: Any, selection: Mapping[str, Any], edges: _Floats) -> None:
    threshold, is_largest = selection["last_score"], selection["largest"]
    end = edges[-1] if is_largest else edges[0]
    axes.axvspan(threshold, end, color=_VERMILION, alpha=0.12, linewidth=0)
    axes.axvline(
        threshold,
        color=_VERMILION,
        linewidth=2,
        label=f"{selection['selected']:,} selected rows: "
        f"{'from' if is_largest else 'up to'} {threshold:.4g}",
    )
    axes.legend(loc="upper left" if is_largest else "upper right", fontsize=10, frameon=False)


def _draw_pairs(axes: Any, pairs: list[Mapping[str, Any]], misclassified: int) -> None:
    names = [f"{pair['label']} → {pair['prediction']}" for pair in pairs]
    counts = [pair["count"] for pair in pairs]
    bars = axes.barh(names, counts, color=_VERMILION, alpha=0.75, height=0.7)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=9, color=_GREY)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(
        title=f"Most confused classes among {misclassified:,} misclassified rows",
        xlabel="rows",
        ylabel="label → prediction",
    )


def _histogram(bins: pa.Table, threshold: float | None) -> tuple[_Floats, _Floats]:
    """Bars of equal width from bins of any width, whose rows spread evenly over them.

    Returns:
        The edges ``[B + 1]`` of the bars and the share ``[B]`` of the rows in each.
    """
    lower, upper, count = (bins[name].to_numpy() for name in ("lower", "upper", "count"))
    is_finite = np.isfinite(lower) & np.isfinite(upper)
    lower, upper, count = lower[is_finite], upper[is_finite], count[is_finite]
    share = count / count.sum()
    after = np.cumsum(share)
    first = lower[np.searchsorted(after, _TAIL)]
    last = upper[min(np.searchsorted(after, 1 - _TAIL), len(upper) - 1)]
    if threshold is not None:
        # A small selection lies in the tail. It gets some room.
        room = _ROOM * (last - first)
        first = min(first, max(threshold - room, lower[0]))
        last = max(last, min(threshold + room, upper[-1]))
    if last - first < _NARROWEST:
        first, last = first - _NARROWEST, last + _NARROWEST
    edges = np.linspace(first, last, _BARS + 1)
    below = np.stack([after - share, after], 1).ravel()
    return edges, np.diff(np.interp(edges, np.stack([lower, upper], 1).ravel(), below))
