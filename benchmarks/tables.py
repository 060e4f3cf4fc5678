"""Markdown tables of the benchmarks' results."""

import csv
from pathlib import Path

NAMES = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "topk": "`torch.topk`",
    "unfused": "product and op",
    "one_hot": "the one-hot product",
    "cross_entropy": "`cross_entropy`",
    "linear_cross_entropy": "`linear_cross_entropy`",
    "product": "the bare product",
    "floor": "the floor",
}
# What does less than the op, so that the ratio is how much longer the op takes.
LOWER_BOUNDS = ("cross_entropy", "product", "floor")

Row = dict[str, str]


def tables(path: Path, linear: bool) -> str:
    """The tables of the linear head, or all others: times of ours, and ratios to the others."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    threads = "" if "NVIDIA" in first["device"] else f", {first['threads']} threads"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows if row["commit"]))
    lines = [
        f"{first['device']}{threads}, torch {first['torch']}, commits {commits}, "
        f"{first['date']}; the lowest median of several runs, in brackets its interquartile range."
    ]
    groups: dict[tuple[str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        if row["op"].startswith("linear_") != linear:
            continue
        shapes = groups.setdefault((row["op"], row["dtype"]), {})
        shapes.setdefault(row["shape"], {})[row["provider"]] = row
    for (op, dtype), shapes in groups.items():
        lines += ["", *table(f"`{op}`, {dtype}", shapes)]
    return "\n".join(lines)


def table(title: str, shapes: dict[str, dict[str, Row]]) -> list[str]:
    """The lines of one op's table."""
    measured = dict.fromkeys(name for providers in shapes.values() for name in providers)
    others = [name for name in measured if name != "marginops"]
    slower = [name for name in others if name not in LOWER_BOUNDS]
    bounds = [name for name in others if name in LOWER_BOUNDS]
    all_rows = [row for providers in shapes.values() for row in providers.values()]
    with_memory = any(row.get("peak_mib") for row in all_rows)
    header = [title, "marginops", "MiB" if with_memory else "GB/s"]
    header += [f"faster than {NAMES[name]}" for name in slower]
    header += [f"time over {NAMES[name]}" for name in bounds]
    if with_memory:
        header += [f"MiB of {NAMES[name]}" for name in others if name != "product"]
    lines = [markdown(header), "|---" + "|---:" * (len(header) - 1) + "|"]
    for shape, providers in shapes.items():
        ours = providers.get("marginops")
        if ours is None:
            continue
        time, spread = float(ours["median_ms"]), float(ours["iqr_ms"])
        cells = [shape, f"{milliseconds(time)} ({milliseconds(spread)})"]
        cells.append(mebibytes(ours) if with_memory else ours["gb_per_s"])
        ratios = {name: float(row["median_ms"]) / time for name, row in providers.items()}
        cells += [times(ratios[name]) if name in ratios else "-" for name in slower]
        cells += [f"{1 / ratios[name]:.2f}" if name in ratios else "-" for name in bounds]
        if with_memory:
            cells += [mebibytes(providers.get(name)) for name in others if name != "product"]
        lines.append(markdown(cells))
    return lines


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
