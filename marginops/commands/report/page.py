"""One HTML file about a recorded run, which needs no network."""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence

from bokeh.embed import components
from bokeh.resources import Resources

from ...training.recording.folder import RecordedRun
from . import curves, data_map, geometry, histogram, visits
from .look import Panel, column, shown
from .samples import Samples
from .style import STYLE

# The page may run its own scripts and nothing else: a browser then makes no request at all.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:"
)


def build(
    run: RecordedRun, *, samples: Samples | None = None, class_names: Sequence[str] | None = None
) -> bytes:
    """Build the page.

    Args:
        run: The recorded run.
        samples: Returns a text or a picture for the index of a sample.
        class_names: The names of the classes; the default are those of the run.
    """
    names = _names(run, class_names)
    epochs, count = shown(run.epochs), run.header["num_samples"]
    panels = [
        curves.accuracy(epochs),
        curves.loss(epochs),
        curves.margins(epochs),
        histogram.histogram(epochs),
        data_map.data_map(run, names, samples),
        data_map.label_issues(run, names, samples),
        geometry.by_class(run.epochs[-1], names),
        geometry.geometry(epochs, names),
        geometry.collapse(epochs),
        visits.by_margin(epochs, count),
        visits.by_class(epochs, count, names),
        curves.others(epochs),
    ]
    return _page(run, [panel for panel in panels if panel is not None]).encode("utf-8")


def _page(run: RecordedRun, panels: list[Panel]) -> str:
    models = {
        panel.name: panel.content
        for panel in panels
        if panel.content is not None and not isinstance(panel.content, str)
    }
    script, divs = components(models)
    resources = Resources(mode="inline", components=["bokeh", "bokeh-widgets", "bokeh-gl"])
    title = html.escape(run.header.get("name") or "Training run")
    sections = "\n".join(_section(panel, divs) for panel in panels)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}</style>
{resources.render_js()}
</head>
<body>
<header>
<h1>{title}</h1>
<p>{_described(run)}</p>
<dl>{_figures(run)}</dl>
</header>
<main>
{sections}
</main>
<footer><p>{_made_by(run)}</p></footer>
{script}
</body>
</html>
"""


def _section(panel: Panel, divs: dict[str, str]) -> str:
    if panel.content is None:
        body = f'<p class="missing">{html.escape(panel.missing)}</p>'
    else:
        body = panel.content if isinstance(panel.content, str) else divs[panel.name]
    wide = ' class="wide"' if panel.is_wide else ""
    return (
        f'<section{wide} id="{panel.name}"><h2>{panel.title}</h2><p>{panel.reading}</p>'
        f"{body}</section>"
    )


def _described(run: RecordedRun) -> str:
    header, first, last = run.header, run.epochs[0]["epoch"], run.epochs[-1]["epoch"]
    parts = [f"Data: {header['data']}"] if header.get("data") else []
    parts.append(f"epochs {first} to {last}" if first != last else f"epoch {first}")
    parts.append(f"began {_date(header['started'])}")
    if isinstance(run.epochs[-1].get("time"), float):
        parts.append(f"last epoch {_date(run.epochs[-1]['time'])}")
    return html.escape(" · ".join(parts))


def _figures(run: RecordedRun) -> str:
    """The few numbers that a reader looks for first."""
    last = run.epochs[-1:]

    def percent(*names: str) -> str:
        return f"{100 * column(last, *names)[0]:.2f} %"

    figures = {"samples": f"{run.header['num_samples']:,}", "epochs": f"{len(run.epochs):,}"}
    figures["training accuracy, as last seen"] = percent("accuracy")
    for name, value in last[0]["values"].items():
        if "acc" in name.lower() and isinstance(value, int | float):
            shown_value = 100 * value if value <= 1.5 else value
            figures[name.replace("_", " ")] = f"{shown_value:.2f} %"
    if not any("test" in name for name in figures) and last[0].get("report"):
        figures["test accuracy"] = percent("report", "test_accuracy")
    margins = last[0].get("margins")
    if margins:
        figures["median margin"] = f"{margins[len(margins) // 2]:.3g}"
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in figures.items()
        if "nan" not in value
    )


def _made_by(run: RecordedRun) -> str:
    header = run.header
    return html.escape(
        f"Recorded by marginops {header.get('marginops')} with torch {header.get('torch')} on "
        f"{header.get('device')}. This file needs no network."
    )


def _date(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return moment.strftime("%d %B %Y, %H:%M UTC").lstrip("0")


def _names(run: RecordedRun, given: Sequence[str] | None) -> list[str]:
    """A name for every class: a given one, or its number."""
    names = list(given if given is not None else run.header.get("class_names") or [])
    largest = max(int(run.labels.max()), int(run.predictions.max()))
    sizes = [len((epoch.get("report") or {}).get("radius") or []) for epoch in run.epochs]
    count = max(largest + 1, *sizes)
    return [str(name) for name in names] + [str(place) for place in range(len(names), count)]
