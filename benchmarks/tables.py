"""Markdown tables of the benchmarks' results."""

import csv
from pathlib import Path

NAMES = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "triton": "Triton",
    "topk": "`torch.topk`",
    "flashinfer": "flashinfer",
    "unfused": "product and op",
    "one_hot": "the one-hot product",
    "cross_entropy": "`cross_entropy`",
    "linear_cross_entropy": "`linear_cross_entropy`",
    "liger": "Liger",
    "cut_cross_entropy": "cut-cross-entropy",
    "product": "the bare product",
    "floor": "the floor",
}
# What does less than the op, so that the ratio is how much longer the op takes.
LOWER_BOUNDS = ("cross_entropy", "product", "floor")

Row = dict[str, str]


def read_results(path: Path) -> list[Row]:
    """The rows of a result file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def time_of(row: Row) -> float:
    """The GPU's milliseconds where they were taken, else those of the whole call."""
    return float(row.get("gpu_ms") or row["median_ms"])


def spread_of(row: Row) -> float:
    """The interquartile range of what :func:`time_of` gives."""
    return float(row["gpu_iqr_ms"] if row.get("gpu_ms") else row["iqr_ms"])


def rate_of(row: Row) -> float:
    """MiB that move in a millisecond, those read and those written."""
    return float(row["mib_moved"]) / time_of(row)


def copy_rate(rows: list[Row]) -> float | None:
    """The best rate of a copy, the ceiling of all that moves memory; None without copies."""
    return max((rate_of(row) for row in rows if row["op"] == "copy"), default=None)


def tables(path: Path, linear: bool) -> str:
    """The tables of the linear head, or all others: times of ours, and ratios to the others."""
    rows = read_results(path)
    groups: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["op"] != "copy" and row["op"].startswith("linear_") == linear:
            shapes = groups.setdefault((row["op"], row["dtype"]), {})
            shapes.setdefault(row["shape"], {})[row["provider"]] = row
    lines = [introduction(rows)]
    for (op, dtype), shapes in groups.items():
        lines += ["", *table(f"`{op}`, {dtype}", shapes, copy_rate(rows))]
    return "\n".join(lines)


def introduction(rows: list[Row]) -> str:
    """Where and with what it was measured, and what the figures are."""
    first, copied = rows[0], copy_rate(rows)
    commits = "".join(f", {name}" for name in dict.fromkeys(row["commit"] for row in rows) if name)
    commits = commits.replace(", ", ", commits ", 1)
    threads = "" if copied else f", {first['threads']} threads"
    where = f"{first['device']}{threads}, torch {first['torch']}{commits}, "
    where += f"{first['date']}; "
    if not copied:
        return where + "the lowest median of several runs, in brackets its interquartile range."
    copies = [row for row in rows if row["op"] == "copy"]
    least = min(copies, key=lambda row: float(row["mib_moved"]))
    return (
        f"{where}the median of the GPU's times with a cold cache, in brackets the interquartile "
        f"range; the share of the {copied * 2**20 / 1e9:.2f} TB/s of a copy; the median of whole "
        "calls, until they are done; and how much faster that is, by the GPU's time and by the "
        f"whole call. So timed, a copy of {least['shape']} takes {milliseconds(time_of(least))}."
    )


def table(title: str, shapes: dict[str, dict[str, Row]], copied: float | None) -> list[str]:
    """The lines of one op's table."""
    measured = dict.fromkeys(name for providers in shapes.values() for name in providers)
    others = [name for name in measured if name != "marginops"]
    slower = [name for name in others if name not in LOWER_BOUNDS]
    bounds = [name for name in others if name in LOWER_BOUNDS]
    all_rows = [row for providers in shapes.values() for row in providers.values()]
    with_memory = any(row.get("peak_mib") for row in all_rows)
    header = [title, "marginops", "MiB" if with_memory else "of a copy" if copied else "GB/s"]
    header += ["whole call"] if copied else []
    header += [f"faster than {NAMES[name]}" for name in slower]
    header += [f"time over {NAMES[name]}" for name in bounds]
    if with_memory:
        header += [f"MiB of {NAMES[name]}" for name in others if name != "product"]
    lines = [markdown(header), "|---" + "|---:" * (len(header) - 1) + "|"]
    for shape, providers in shapes.items():
        ours = providers.get("marginops")
        if ours is None:
            continue
        cells = [shape, f"{milliseconds(time_of(ours))} ({milliseconds(spread_of(ours))})"]
        if with_memory:
            cells.append(mebibytes(ours))
        else:
            cells.append(f"{rate_of(ours) / copied:.0%}" if copied else ours["gb_per_s"])
        cells += [milliseconds(float(ours["median_ms"]))] if copied else []
        cells += [faster(ours, providers.get(name)) for name in slower]
        cells += [longer(ours, providers.get(name)) for name in bounds]
        if with_memory:
            cells += [mebibytes(providers.get(name)) for name in others if name != "product"]
        lines.append(markdown(cells))
    return lines


def faster(ours: Row, other: Row | None) -> str:
    """How many times faster we are; on a GPU also by the time of the whole call."""
    if other is None:
        return "-"
    ratio = times(time_of(other) / time_of(ours))
    if not ours.get("gpu_ms"):
        return ratio
    return f"{ratio}, {times(float(other['median_ms']) / float(ours['median_ms']))}"


def longer(ours: Row, bound: Row | None) -> str:
    """How many times longer we take than what does less."""
    return "-" if bound is None else f"{time_of(ours) / time_of(bound):.2f}"


def markdown(cells: list[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def mebibytes(row: Row | None) -> str:
    """The extra memory at the peak."""
    return f"{float(row['peak_mib']):.0f}" if row and row.get("peak_mib") else "-"


def times(ratio: float) -> str:
    """One decimal for small ratios."""
    return f"{ratio:.1f} x" if ratio < 10 else f"{ratio:.0f} x"


def milliseconds(time: float) -> str:
    """Three digits, in ms or us."""
    return f"{time:.3g} ms" if time >= 1 else f"{time * 1e3:.3g} us"
