"""The data map and the table of suspicious labels."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import torch
from bokeh.models import ColumnDataSource, CustomJSHover, HoverTool

from ...training.recording.folder import RecordedRun
from .look import VERMILION, Panel, add_colour_bar, add_legend, new_figure
from .samples import Samples, preview

_MOST_POINTS = 12_000
_MOST_PREVIEWS = 1_500
_SUSPICIOUS = 100

_TOOLTIP = """
<div class="sample">@preview{safe}
<b>sample @index{0}</b><br>label: @label{custom}<br>predicted: @predicted{custom}<br>
confidence @y{0.00}, variability @x{0.00}<br>correct at @correctness{0 %} of @count visits</div>
"""


def data_map(run: RecordedRun, names: list[str], samples: Samples | None) -> Panel:
    """Confidence over variability, one point per sample."""
    found = run.dynamics.data_map()
    title, reading = (
        "Data map",
        "One point per sample. Top left: easy. Right: ambiguous. Bottom left: hard or mislabelled. "
        "Hover over a point to see the sample; orange rings are the most suspicious labels.",
    )
    if len(found.indices) == 0:
        missing = "Record with RunRecorder.update; no sample of this run has a finite probability."
        return Panel(title, reading, None, missing, is_wide=True)
    suspicious = _suspicious(run)
    total = len(found.indices)
    rows = _rows(found.indices, suspicious, _MOST_POINTS if samples is None else _MOST_PREVIEWS)
    if len(rows) < total:
        reading += (
            f" {len(rows):,} of the {total:,} samples are drawn: the most suspicious ones, and "
            "others at equal distances in the data set."
        )
    indices = found.indices[rows]
    data: dict[str, Any] = {
        "x": found.variability[rows].numpy(),
        "y": found.confidence[rows].numpy(),
        "correctness": found.correctness[rows].numpy(),
        "index": indices.int().numpy(),
        "label": run.labels[indices].numpy(),
        "predicted": run.predictions[indices].numpy(),
        "count": run.dynamics.count[indices].numpy(),
        "preview": ["" if samples is None else preview(samples, int(i)) for i in indices],
    }
    if samples is None:
        del data["preview"]
    made = new_figure(
        "variability: deviation of the probability of the label",
        "confidence: mean probability of the label",
        **{"height": 460, "y_range": (-0.03, 1.03), "output_backend": "webgl"},
    )
    mapper = add_colour_bar(made, "correct visits", 0, 1)
    points = made.scatter(
        **{"x": "x", "y": "y", "source": ColumnDataSource(data, name="data map"), "size": 5},
        **{"fill_color": {"field": "correctness", "transform": mapper}, "line_color": None},
        alpha=0.8,
    )
    is_ringed = np.isin(data["index"], suspicious.numpy())
    rings = made.scatter(
        **{"x": data["x"][is_ringed], "y": data["y"][is_ringed], "size": 9, "line_width": 1.2},
        **{"fill_color": None, "line_color": VERMILION},
    )
    named = CustomJSHover(args={"names": names}, code="return names[value] ?? String(value)")
    made.add_tools(
        HoverTool(
            renderers=[points],
            tooltips=_TOOLTIP if samples else _TOOLTIP.replace("@preview{safe}", ""),
            formatters={"@label": named, "@predicted": named},
            limit=1,
            visible=False,
        )
    )
    add_legend(made, [(f"the {int(is_ringed.sum())} most suspicious labels", [rings])])
    return Panel(title, reading, made, is_wide=True, name="data-map")


def label_issues(run: RecordedRun, names: list[str], samples: Samples | None) -> Panel:
    """The table of the most suspicious labels."""
    found = run.dynamics.label_issues()
    indices = found.indices[:_SUSPICIOUS].tolist()
    title, reading = (
        "Suspicious labels",
        f"The {len(indices)} samples with the smallest mean margin over all visits. A wrong label "
        "contradicts what the network learns from the others; look at these samples first.",
    )
    if not indices:
        missing = "Record with RunRecorder.update; no sample of this run was seen."
        return Panel(title, reading, None, missing, is_wide=True)
    dynamics = run.dynamics
    confidence, count = dynamics.confidence, dynamics.count
    head = ["rank", "sample", "label", "predicted", "mean margin", "confidence", "visits"]
    if samples is not None:
        head.insert(2, "content")
    lines = []
    for rank, index in enumerate(indices, 1):
        cells = [
            f"<td>{rank}</td><td>{index}</td>",
            f'<td class="word">{_name(names, run.labels[index])}</td>',
            f'<td class="word">{_name(names, run.predictions[index])}</td>',
            f"<td>{float(found.scores[rank - 1]):.3g}</td>",
            f"<td>{float(confidence[index]):.3f}</td><td>{int(count[index])}</td>",
        ]
        if samples is not None:
            cells.insert(1, f'<td class="word">{preview(samples, index)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    columns = "".join(f"<th>{name}</th>" for name in head)
    content = (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{columns}</tr></thead><tbody>'
        f"{''.join(lines)}</tbody></table></div>"
    )
    return Panel(title, reading, content, is_wide=True, name="label-issues")


def _suspicious(run: RecordedRun) -> torch.Tensor:
    """The most suspicious samples, but no more than a twentieth of all."""
    found = run.dynamics.label_issues().indices
    return found[: min(_SUSPICIOUS, len(found) // 20)]


def _rows(indices: torch.Tensor, suspicious: torch.Tensor, most: int) -> torch.Tensor:
    """All rows, or the suspicious ones with others at equal distances; ascending."""
    if len(indices) <= most:
        return torch.arange(len(indices))
    first = torch.isin(indices, suspicious).nonzero().squeeze(1)
    others = torch.linspace(0, len(indices) - 1, most - len(first)).round().long()
    return torch.cat([first, others]).unique()


def _name(names: list[str], label: Any) -> str:
    place = int(label)
    return html.escape(names[place] if 0 <= place < len(names) else str(place))
