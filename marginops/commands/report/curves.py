"""The panels of what changes from epoch to epoch: accuracy, loss, margins and the user's values."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.layouts import column as stacked
from bokeh.models import ColumnDataSource, HoverTool, Span

from .look import BLACK, BLUE, Panel, add_legend, axis_type, column, draw_lines, new_figure

_LEVELS = {"5": 0.05, "25": 0.25, "50": 0.5, "75": 0.75, "95": 0.95}
_MOST_VALUES = 8


def accuracy(epochs: list[dict[str, Any]]) -> Panel:
    """Shares of correct samples."""
    curves = {"training, as last seen": 100 * np.array(column(epochs, "accuracy"))}
    error = 100 * np.array(column(epochs, "report", "training_error"))
    curves["training, after the epoch"] = 100 - error
    if not any("test" in name for name in _names(epochs)):
        curves["test"] = 100 * np.array(column(epochs, "report", "test_accuracy"))
    for name in _names(epochs):
        if _is_accuracy(name):
            values = np.array(column(epochs, "values", name))
            # Some loops report percent.
            curves[_words(name)] = values if np.nanmax(values, initial=0) > 1.5 else 100 * values
    made = new_figure("epoch", "correct samples (%)")
    draw_lines(made, _numbers(epochs), _finite(curves), " %", columns=2)
    return Panel(
        "Accuracy",
        "The share of correctly classified samples. “As last seen” takes each training sample as "
        "the network classified it when it last visited the sample.",
        made,
        name="accuracy",
    )


def loss(epochs: list[dict[str, Any]]) -> Panel:
    """The cross-entropy, and losses of the user."""
    curves = {"training, as last seen": np.array(column(epochs, "loss"))}
    for name in _names(epochs):
        if _is_loss(name):
            curves[_words(name)] = np.array(column(epochs, "values", name))
    curves = _finite(curves)
    made = new_figure("epoch", "loss (nats)", y_axis_type=axis_type(curves.values()))
    draw_lines(made, _numbers(epochs), curves)
    return Panel(
        "Loss",
        "The mean cross-entropy of the training samples when they were last visited, and every "
        "recorded value whose name contains “loss”. Lower is better.",
        made if curves else None,
        "No sample has a finite loss; look for NaN in the logits.",
        name="loss",
    )


def margins(epochs: list[dict[str, Any]]) -> Panel:
    """Quantiles of the margins."""
    kept = [epoch for epoch in epochs if epoch.get("margins")]
    reading = (
        "The margin is the logit of the label minus the largest other logit, and below 0 the "
        "sample is misclassified. The bands hold the middle 50 % and 90 % of the samples."
    )
    missing = "Record with RunRecorder.update, which notes the margins; no margin here is finite."
    if not kept:
        return Panel("Margins over time", reading, None, missing)
    quantiles = np.array([epoch["margins"] for epoch in kept])
    levels = np.linspace(0, 1, quantiles.shape[1])
    data = {
        name: [np.interp(level, levels, row) for row in quantiles]
        for name, level in _LEVELS.items()
    }
    source = ColumnDataSource({"x": _numbers(kept), **data})
    made = new_figure("epoch", "margin (logits)")
    made.add_layout(Span(location=0, dimension="width", line_color="#9aa0a6", line_dash="dashed"))
    wide = made.varea("x", "5", "95", source=source, color=BLUE, alpha=0.15)
    narrow = made.varea("x", "25", "75", source=source, color=BLUE, alpha=0.3)
    median = made.line("x", "50", source=source, color=BLACK, line_width=2)
    points = made.scatter("x", "50", source=source, color=BLACK, size=5)
    rows = "".join(f"<br>{name} %: @{{{name}}}{{0.[000]}}" for name in reversed(_LEVELS))
    tooltips = f"<b>epoch @x</b>, quantiles of the margin{rows}"
    made.add_tools(HoverTool(renderers=[points], tooltips=tooltips, mode="vline", visible=False))
    add_legend(
        made,
        [("median", [median, points]), ("25 to 75 %", [narrow]), ("5 to 95 %", [wide])],
    )
    return Panel("Margins over time", reading, made, name="margins")


def others(epochs: list[dict[str, Any]]) -> Panel | None:
    """The other values of the user, each in a figure of its own."""
    names = [name for name in _names(epochs) if not (_is_accuracy(name) or _is_loss(name))]
    figures = []
    for name in names[:_MOST_VALUES]:
        made = new_figure("epoch", _words(name), height=180)
        draw_lines(made, _numbers(epochs), {_words(name): column(epochs, "values", name)})
        made.legend.visible = False
        figures.append(made)
    if not figures:
        return None
    reading = "What the training passed to RunRecorder.end_epoch beside accuracies and losses."
    if len(names) > _MOST_VALUES:
        reading += f" The first {_MOST_VALUES} of {len(names)} values are shown."
    return Panel(
        "Other values",
        reading,
        stacked(figures, sizing_mode="stretch_width"),
        name="others",
    )


def _names(epochs: list[dict[str, Any]]) -> list[str]:
    """The names of the user's values that have a number in some epoch."""
    names: dict[str, None] = {}
    for epoch in epochs:
        names |= {name: None for name, value in epoch["values"].items() if value is not None}
    return list(names)


def _numbers(epochs: list[dict[str, Any]]) -> list[int]:
    return [epoch["epoch"] for epoch in epochs]


def _finite(curves: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in curves.items() if np.isfinite(values).any()}


def _is_accuracy(name: str) -> bool:
    return "acc" in name.lower()


def _is_loss(name: str) -> bool:
    return "loss" in name.lower()


def _words(name: str) -> str:
    return name.replace("_", " ")
