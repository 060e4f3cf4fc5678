"""What ``marginops score`` tells about a run, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Numbers = Mapping[str, Any]

_KINDS = {
    "missing": "without values (null)",
    "nan": "with a NaN among their values",
    "infinite": "with an infinity among their values",
    "overflow": "with finite values, but logits that are not finite",
    "unlabelled": "without a label",
}
_MOST_PAIRS = 5


def sentences(summary: Numbers) -> Iterator[str]:
    """Yield paragraphs about the rows of a run and about what is kept of them.

    Args:
        summary: The content of ``summary.json``.
    """
    yield _rows(summary["rows"])
    if "margins" in summary:
        yield _distribution(summary["margins"])
    if "selection" in summary:
        yield _selection(summary["selection"])
    if "selection_per_class" in summary:
        yield _selection_per_class(summary["selection_per_class"])
    if "label_issues" in summary:
        yield _label_issues(summary["label_issues"])
    if "moments" in summary:
        yield _moments(summary["moments"])


def speed(rows: int, seconds: float, rates: tuple[float, float] | None) -> str:
    """The time of a run and its rows and bytes a second, in words."""
    text = f"{rows:,} rows in {seconds:.1f} s"
    if rates is not None:
        text += f"; after the first batch {rates[0]:,.0f} rows/s, {rates[1] / 1e6:,.1f} MB/s"
    return text


def _rows(counts: Numbers) -> str:
    lines = [f"{counts['rows']:,} rows"]
    found = {name: counts.get(name, 0) for name in _KINDS}
    width = len(f"{max(found.values()):,}")
    lines += [f"  {found[name]:>{width},} {_KINDS[name]}" for name in _KINDS if found[name]]
    if len(lines) == 1:
        lines[0] += ", all of them with finite values and logits"
    elif any(found[name] for name in _KINDS if name != "unlabelled"):
        lines.append("Rows whose values or logits are not finite come last in every selection.")
    return "\n".join(lines)


def _distribution(margins: Numbers) -> str:
    columns = {
        "smallest": margins["minimum"],
        **{
            "median" if share == "0.5" else f"{100 * float(share):g} %": value
            for share, value in margins["quantiles"].items()
        },
        "largest": margins["maximum"],
    }
    lines = [
        f"{margins['by']} of {margins['count']:,} rows",
        "".join(f"{name:>12}" for name in columns),
        "".join(f"{_number(value):>12}" for value in columns.values()),
    ]
    if margins["by"] == "margin" and margins["count"]:
        lines.append(f"{_percent(margins['separation'])} of them are classified correctly.")
    return "\n".join(lines)


def _selection(selection: Numbers) -> str:
    order = "largest" if selection["largest"] else "smallest"
    selected, by = selection["selected"], selection["by"]
    if selected < selection["k"]:
        return (
            f"selected: all {selected:,} rows that have a {by}, fewer than the "
            f"{selection['k']:,} asked for"
        )
    return (
        f"selected: the {selected:,} rows with the {order} {by}, from "
        f"{_number(selection['first_score'])} to {_number(selection['last_score'])}"
    )


def _selection_per_class(selection: Numbers) -> str:
    order = "largest" if selection["largest"] else "smallest"
    k, counts = selection["k"], selection["selected_per_class"]
    what = "label" if selection["class"] == "target" else "predicted class"
    line = (
        f"selected per class: {selection['selected']:,} rows, the {k:,} with the {order} "
        f"{selection['by']} of each {what}"
    )
    fewer = [str(place) for place, count in enumerate(counts) if count < k]
    if fewer:
        shown = ", ".join(fewer[:10]) + (", ..." if len(fewer) > 10 else "")
        line += f"\nclasses with fewer rows, {len(fewer):,} of {len(counts):,}: {shown}"
    return line


def _label_issues(issues: Numbers) -> str:
    if issues["error_rate"] is None:
        return "label issues: no row has a label and finite logits"
    kept = min(issues["k"], issues["misclassified"])
    lines = [
        f"label issues: {issues['misclassified']:,} labelled rows are misclassified, "
        f"{_percent(issues['error_rate'])}; the {kept:,} with the most negative margin are kept"
    ]
    pairs = issues["most_confused"][:_MOST_PAIRS]
    width = max((len(f"{pair['count']:,}") for pair in pairs), default=0)
    lines += [
        f"  {pair['count']:>{width},} rows of label {pair['label']} look like class "
        f"{pair['prediction']}"
        for pair in pairs
    ]
    return "\n".join(lines)


def _moments(moments: Numbers) -> str:
    line = (
        f"class moments: {moments['classes']:,} classes of {moments['features']:,} values, mean "
        f"radius {_number(moments['mean_radius'])}"
    )
    if moments["empty_classes"]:
        line += f"; classes without rows: {moments['empty_classes']:,}"
    return line


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
