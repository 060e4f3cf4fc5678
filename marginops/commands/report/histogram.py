"""The panel of the distribution of the margins, with a slider over the epochs."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.layouts import column as stacked
from bokeh.models import ColumnDataSource, CustomJS, FixedTicker, HoverTool, Slider, Span

from .look import BLUE, VERMILION, Panel, new_figure

_BINS = 60

_MOVE = """
const place = slider.value
source.data = {...source.data, share: shares.data.share.slice(place * bins, (place + 1) * bins)}
figure.title.text = titles[place]
"""


def histogram(epochs: list[dict[str, Any]]) -> Panel:
    """The margins of every epoch on common edges."""
    kept = [epoch for epoch in epochs if epoch.get("margins")]
    title = "Margin distribution by epoch"
    reading = (
        "Move the slider to see how the margins spread. Orange bars are misclassified samples. "
        "All epochs share the axes; the margin axis is linear near 0 and logarithmic far from it."
    )
    if not kept:
        missing = "Record with RunRecorder.update; no margin of this run is finite."
        return Panel(title, reading, None, missing)
    quantiles = np.array([epoch["margins"] for epoch in kept])
    scale = float(np.median(np.abs(quantiles))) / 2 or 1.0
    places = _places(np.arcsinh(quantiles / scale))
    edges = np.sinh(places) * scale
    levels = np.linspace(0, 1, quantiles.shape[1])
    below = np.array([np.interp(edges, row, levels, left=0, right=1) for row in quantiles])
    shares = 100 * np.diff(below, axis=1)

    made = new_figure("margin (logits)", "samples (%)", y_range=(0, 1.05 * float(shares.max())))
    names = [str(epoch["epoch"]) for epoch in kept]
    titles = [
        f"epoch {name}: {100 * (1 - np.interp(0, row, levels)):.1f} % of the samples above 0, "
        f"median {np.median(row):.3g}"
        for name, row in zip(names, quantiles, strict=True)
    ]
    source = ColumnDataSource(
        {
            **{"left": places[:-1], "right": places[1:], "from": edges[:-1], "to": edges[1:]},
            "share": shares[-1].astype(np.float32),
            "color": [VERMILION if edge < -1e-9 * scale else BLUE for edge in edges[:-1]],
        },
        name="histogram",
    )
    bars = made.quad(
        **{"left": "left", "right": "right", "top": "share", "bottom": 0, "source": source},
        **{"fill_color": "color", "line_color": "white", "line_width": 0.5},
    )
    made.add_layout(Span(location=0, dimension="height", line_color="#555b63"))
    tooltips = "margin @from{0.[000]} to @to{0.[000]}: <b>@share{0.[00]} %</b> of the samples"
    made.add_tools(HoverTool(renderers=[bars], tooltips=tooltips, visible=False))
    _set_ticks(made.xaxis, edges, scale)
    made.title.text = titles[-1]
    if len(kept) == 1:
        return Panel(title, reading, made, name="histogram")
    slider = Slider(
        **{"start": 0, "end": len(kept) - 1, "value": len(kept) - 1, "step": 1},
        **{"title": None, "show_value": False, "sizing_mode": "stretch_width"},
        **{"name": "epoch", "margin": (5, 20, 5, 20)},
    )
    # One flat column, because only such a column is stored as binary numbers.
    every = ColumnDataSource({"share": shares.astype(np.float32).ravel()})
    named = {"slider": slider, "source": source, "shares": every, "bins": shares.shape[1]}
    named |= {"figure": made, "titles": titles}
    slider.js_on_change("value", CustomJS(args=named, code=_MOVE))
    return Panel(
        title, reading, stacked(slider, made, sizing_mode="stretch_width"), name="histogram"
    )


def _places(values: Any) -> Any:
    """Edges at equal distances, of which one is 0."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    step = (high - low) / (_BINS - 2) or 1.0
    return step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)


def _set_ticks(axis: Any, edges: Any, scale: float) -> None:
    """Ticks at 0 and at round numbers of both signs."""
    largest = max(abs(edges[0]), abs(edges[-1]), scale)
    powers = 10.0 ** np.arange(np.floor(np.log10(scale)), np.ceil(np.log10(largest)) + 1)
    round_numbers = np.concatenate([powers, 3 * powers]) if len(powers) < 4 else powers
    values = np.unique(np.concatenate([-round_numbers, [0.0], round_numbers]))
    values = values[(values >= edges[0]) & (values <= edges[-1])]
    places = np.arcsinh(values / scale)
    axis.ticker = FixedTicker(ticks=places.tolist())
    axis.major_label_overrides = {
        float(place): f"{value:g}" for place, value in zip(places, values, strict=True)
    }
