"""The panels of what each epoch visited."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool

from .look import Panel, add_colour_bar, new_figure

_MOST_CLASSES = 40
_TENTHS = ["smallest", *(str(place) for place in range(2, 10)), "largest"]


def by_margin(epochs: list[dict[str, Any]], num_samples: int) -> Panel:
    """Which tenths of the samples, in the order of their margins, each epoch visited."""
    title = "What selection visited, by margin"
    reading = (
        "Each column is an epoch, and each row a tenth of the samples, in the order of their "
        "margins before the epoch. Bright cells were visited."
    )
    if all(epoch["visited"] == num_samples for epoch in epochs):
        reason = "Every epoch visited all samples, so there was no selection."
        return Panel(title, reading, None, reason)
    kept = [epoch for epoch in epochs if epoch.get("visited_by_margin")]
    if not kept:
        missing = "Record at least two epochs of ten samples: the first epoch knows no margins yet."
        return Panel(title, reading, None, missing)
    last = epochs[-1]
    reading += (
        f" The last epoch visited {last['visited']:,} of {num_samples:,} samples, "
        f"{last['new']:,} of them for the first time."
    )
    shares = 100 * np.array([epoch["visited_by_margin"] for epoch in kept], np.float64)
    return Panel(title, reading, _map(kept, shares, _TENTHS, "tenth"), name="visits-margin")


def by_class(epochs: list[dict[str, Any]], num_samples: int, names: list[str]) -> Panel | None:
    """Which share of each class each epoch visited."""
    if all(epoch["visited"] == num_samples for epoch in epochs):
        return None
    kept = [epoch for epoch in epochs if epoch.get("classes")]
    if not kept:
        return None
    count = min(len(kept[-1]["classes"]["samples"]), _MOST_CLASSES)

    def share(epoch: dict[str, Any]) -> Any:
        parts = (np.array(epoch["classes"][name], np.float64) for name in ("visited", "samples"))
        visited, samples = (np.pad(part, (0, max(0, count - len(part))))[:count] for part in parts)
        return 100 * np.divide(visited, samples, out=np.full(count, np.nan), where=samples > 0)

    reading = (
        "Each column is an epoch, and each row a class. The colour is the share of the samples of "
        "the class, as far as they were ever seen, that the epoch visited."
    )
    if count < len(kept[-1]["classes"]["samples"]):
        reading += f" The first {count} classes are shown."
    figure = _map(kept, np.array([share(epoch) for epoch in kept]), names[:count], "class")
    return Panel("What selection visited, by class", reading, figure, name="visits-class")


def _map(epochs: list[dict[str, Any]], shares: Any, rows: list[str], what: str) -> Any:
    """A map of shares ``[E, R]``, with the first row at the bottom."""
    numbers = np.array([epoch["epoch"] for epoch in epochs], np.float64)
    middles = (numbers[1:] + numbers[:-1]) / 2
    left = np.concatenate([[numbers[0] - 0.5], middles])
    right = np.concatenate([middles, [numbers[-1] + 0.5]])
    count = len(rows)
    source = ColumnDataSource(
        {
            "left": np.repeat(left, count),
            "right": np.repeat(right, count),
            "bottom": np.tile(np.arange(count) - 0.5, len(numbers)),
            "top": np.tile(np.arange(count) + 0.5, len(numbers)),
            "share": shares.astype(np.float32).ravel(),
            "epoch": np.repeat(numbers, count).astype(np.int32),
            "row": rows * len(numbers),
        }
    )
    label = "margin before the epoch (tenth)" if what == "tenth" else "class"
    made = new_figure("epoch", label, height=max(300, 80 + 20 * count))
    made.grid.visible = False
    made.x_range.range_padding = made.y_range.range_padding = 0
    mapper = add_colour_bar(made, "visited (%)", 0, 100)
    cells = made.quad(
        **{"left": "left", "right": "right", "bottom": "bottom", "top": "top", "source": source},
        **{"fill_color": {"field": "share", "transform": mapper}, "line_color": None},
    )
    made.yaxis.ticker = FixedTicker(ticks=list(range(count)))
    made.yaxis.major_label_overrides = {place: row[:24] for place, row in enumerate(rows)}
    tooltips = f"epoch @epoch, {what} <b>@row</b>: @share{{0.0}} % visited"
    made.add_tools(HoverTool(renderers=[cells], tooltips=tooltips, visible=False))
    return made
