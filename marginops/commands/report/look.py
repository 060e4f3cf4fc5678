"""What all figures of a report share: colours, fonts, axes, and the epochs that they show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from bokeh.models import BasicTicker, ColorBar, HoverTool, Legend, LinearColorMapper
from bokeh.palettes import Cividis256, TolRainbow
from bokeh.plotting import figure

# Okabe and Ito (2008): readers with every kind of colour vision can tell them apart.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK = (
    *("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#222222"),
)
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
_DASHES = ("solid", "dashed", "dotdash")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_INK, _GRID = "#4a4f57", "#e6e8eb"
_MOST_EPOCHS = 200


@dataclass(frozen=True)
class Panel:
    """One part of a report.

    Attributes:
        title: The title.
        reading: One or two sentences: how to read it.
        content: A model of Bokeh, a piece of HTML, or None if its data is missing.
        missing: What to record so that the panel has data.
        is_wide: Whether it takes the whole width of the page.
        name: The name in the document.
    """

    title: str
    reading: str
    content: Any
    missing: str = ""
    is_wide: bool = False
    name: str = ""


def new_figure(x_label: str, y_label: str, **options: Any) -> Any:
    """An empty figure as wide as its panel."""
    made = figure(
        **{
            **{"height": 320, "sizing_mode": "stretch_width", "min_width": 240},
            **{"tools": "pan,box_zoom,wheel_zoom,reset,save", "toolbar_location": "above"},
            # A drag or the wheel over a figure scrolls the page until the reader picks a tool.
            **{"active_drag": None, "active_scroll": None, "outline_line_color": None},
            **options,
        }
    )
    made.toolbar.logo = None
    made.toolbar.autohide = True
    made.xaxis.axis_label, made.yaxis.axis_label = x_label, y_label
    made.axis.axis_label_text_font_style = "normal"
    for name, size in (("axis_label", "13px"), ("major_label", "12px")):
        setattr(made.axis, f"{name}_text_font", _FONT)
        setattr(made.axis, f"{name}_text_font_size", size)
        setattr(made.axis, f"{name}_text_color", _INK)
    made.axis.axis_line_color = made.axis.major_tick_line_color = "#b5bac1"
    made.axis.minor_tick_line_color = None
    made.grid.grid_line_color = _GRID
    made.title.text_font, made.title.text_font_size = _FONT, "13px"
    made.title.text_color, made.title.text_font_style = _INK, "normal"
    return made


def draw_lines(
    made: Any, epochs: Sequence[int], curves: dict[str, Any], unit: str = "", columns: int = 3
) -> None:
    """Draw curves over the epochs, with their legend below and a tooltip."""
    items = []
    for place, (name, values) in enumerate(curves.items()):
        color = COLOURS[place % len(COLOURS)]
        dash = _DASHES[place // len(COLOURS) % len(_DASHES)]
        items.append((name, draw_line(made, epochs, name, values, color, dash, unit)))
    add_legend(made, items, columns)


def draw_line(
    made: Any,
    epochs: Sequence[int],
    name: str,
    values: Any,
    color: str,
    dash: str = "solid",
    unit: str = "",
) -> list[Any]:
    """Draw one curve over the epochs with its tooltip. Returns what its legend stands for."""
    data = {"x": np.asarray(epochs), "y": np.asarray(values, np.float64)}
    line = made.line(**data, color=color, line_width=2, line_dash=dash)
    dots = made.scatter(**data, color=color, size=5 if len(epochs) <= 40 else 2)
    tooltips = f"<b>{escaped(name)}</b><br>epoch @x: @y{{0.[0000]}}{unit}"
    made.add_tools(HoverTool(renderers=[dots], tooltips=tooltips, visible=False))
    return [line, dots]


def add_legend(made: Any, items: Sequence[Any], columns: int = 3) -> None:
    """Add a legend below a figure. A click on an entry hides its curve."""
    legend = Legend(
        items=list(items),
        **{"ncols": columns, "border_line_color": None, "padding": 0, "margin": 4, "spacing": 2},
        **{"label_text_font": _FONT, "label_text_font_size": "12px", "glyph_width": 18},
        **{"label_text_color": _INK, "click_policy": "hide", "background_fill_alpha": 0},
    )
    made.add_layout(legend, "below")


def add_colour_bar(made: Any, title: str, low: float, high: float) -> LinearColorMapper:
    """Add a bar that explains the colours of a figure; returns how numbers become colours."""
    mapper = LinearColorMapper(palette=Cividis256, low=low, high=high, nan_color="#ffffff")
    bar = ColorBar(
        color_mapper=mapper,
        **{"title": title, "width": 10, "padding": 6, "ticker": BasicTicker(desired_num_ticks=5)},
        **{"title_text_font": _FONT, "title_text_font_size": "12px"},
        **{"title_text_font_style": "normal", "title_text_color": _INK},
        **{"major_label_text_font": _FONT, "major_label_text_color": _INK},
    )
    made.add_layout(bar, "right")
    return mapper


def class_colours(count: int) -> list[str]:
    """Colours for so many classes, up to 23."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return list(TolRainbow[count])


def shown(epochs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All epochs, or about 200 that are spread evenly over them, with the last one."""
    every = -(-len(epochs) // _MOST_EPOCHS)
    return list(epochs[::-1][::every][::-1])


def axis_type(curves: Iterable[Any]) -> str:
    """A logarithmic axis for positive curves that span more than two decades, else a linear one."""
    values = np.concatenate([np.ravel(curve) for curve in curves] or [np.ones(1)])
    values = values[np.isfinite(values)]
    is_wide = len(values) > 0 and values.min() > 0 and values.max() > 100 * values.min()
    return "log" if is_wide else "linear"


def column(epochs: Sequence[dict[str, Any]], *names: str) -> list[float]:
    """One number of every epoch, NaN where there is none."""

    def find(epoch: Any) -> float:
        for name in names:
            epoch = epoch.get(name) if isinstance(epoch, dict) else None
        return float(epoch) if isinstance(epoch, int | float) else np.nan

    return [find(epoch) for epoch in epochs]


def escaped(text: str) -> str:
    """Text for a tooltip, in which @ and $ do not stand for data."""
    import html

    return html.escape(text).replace("@", "&#64;").replace("$", "&#36;")
