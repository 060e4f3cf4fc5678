"""The panels of neural collapse and of the class geometry."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool

from .look import (
    BLACK,
    Panel,
    add_legend,
    axis_type,
    class_colours,
    column,
    draw_line,
    draw_lines,
    new_figure,
)

_MOST_LINES = 23
_COLLAPSE = {
    "nc1": "NC1 spread within classes",
    "nc2_norm_means": "NC2 norms of means",
    "nc2_angle_means": "NC2 angles of means",
    "nc3": "NC3 means and weights",
    "nc4": "NC4 nearest mean differs",
}
_MISSING = (
    "Pass report=report_epoch(network, inputs, target) to RunRecorder.end_epoch to have this panel."
)


def collapse(epochs: list[dict[str, Any]]) -> Panel:
    """Neural collapse of the last hidden layer."""
    kept = [epoch for epoch in epochs if epoch.get("report")]
    curves = {}
    for name, words in _COLLAPSE.items():
        values = np.array(column(kept, "report", "collapse", name))
        values[~(values > 0)] = np.nan  # an exact 0 has no place on a logarithmic axis
        if np.isfinite(values).any():
            curves[words] = values
    made = new_figure(
        "epoch", "distance from collapse (no unit)", y_axis_type=axis_type(curves.values())
    )
    draw_lines(made, [epoch["epoch"] for epoch in kept], curves, columns=2)
    return Panel(
        "Neural collapse",
        "Each curve is 0 when the last hidden layer has collapsed to one point per class, at equal "
        "norms and angles. Curves that fall mean that the layer collapses.",
        made if curves else None,
        _MISSING,
        name="collapse",
    )


def geometry(epochs: list[dict[str, Any]], names: list[str]) -> Panel:
    """The radii of the classes and the distance between them."""
    kept = [epoch for epoch in epochs if (epoch.get("report") or {}).get("radius")]
    title, reading = (
        "Class geometry",
        "The radius of every class in the last hidden layer on the unit sphere, and the mean "
        "distance between class means. Small radii and large distances separate the classes well.",
    )
    if not kept:
        return Panel(title, reading, None, _MISSING)
    numbers = [epoch["epoch"] for epoch in kept]
    radii = np.array([epoch["report"]["radius"] for epoch in kept], np.float64)
    made = new_figure("epoch", "length (unit sphere)")
    count = radii.shape[1]
    if count <= _MOST_LINES:
        curves = dict(zip(names, radii.T, strict=False))
    else:
        curves = {
            "largest radius": np.nanmax(radii, 1),
            "mean radius": np.nanmean(radii, 1),
            "smallest radius": np.nanmin(radii, 1),
        }
    colours = class_colours(len(curves))
    items = [
        (name, draw_line(made, numbers, name, values, colour))
        for (name, values), colour in zip(curves.items(), colours, strict=True)
    ]
    distance = column(kept, "report", "mean_distance")
    if np.isfinite(distance).any():
        words = "mean distance"
        items.append((words, draw_line(made, numbers, words, distance, BLACK, "dashed")))
    add_legend(made, items)
    return Panel(title, reading, made, name="geometry")


def by_class(epoch: dict[str, Any], names: list[str]) -> Panel:
    """The accuracy of every class after the last epoch."""
    classes = epoch.get("classes")
    title, reading = (
        "Accuracy by class",
        "The share of the training samples of each class that were correct when they were last "
        "visited, after the last epoch. The worst class stands at the top.",
    )
    if not classes:
        missing = "A run keeps the numbers of each class for up to 1000 classes; this one has more."
        return Panel(title, reading, None, missing)
    samples, correct = np.array(classes["samples"]), np.array(classes["correct"])
    share = 100 * correct / np.maximum(samples, 1)
    order = [place for place in np.argsort(share, kind="stable") if samples[place]][:30]
    if len(order) < (samples > 0).sum():
        reading += f" The {len(order)} worst of {(samples > 0).sum()} classes are shown."
    rows = np.arange(len(order), 0, -1)
    source = ColumnDataSource(
        {
            **{"row": rows, "share": share[order], "name": [names[place] for place in order]},
            **{"samples": samples[order], "correct": correct[order]},
        }
    )
    made = new_figure("correct samples (%)", "class", height=max(220, 90 + 22 * len(order)))
    made.yaxis.ticker = FixedTicker(ticks=rows.tolist())
    made.yaxis.major_label_overrides = {
        int(row): names[place][:24] for row, place in zip(rows, order, strict=True)
    }
    made.ygrid.visible = False
    bars = made.hbar(y="row", right="share", height=0.7, source=source, color="#0072b2")
    made.x_range.start = 0
    tooltips = "<b>@name</b>: @correct of @samples samples, @share{0.0} %"
    made.add_tools(HoverTool(renderers=[bars], tooltips=tooltips, visible=False))
    return Panel(title, reading, made, name="classes")
