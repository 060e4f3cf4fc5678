"""Markdown tables of the benchmarks' results."""

import csv
from pathlib import Path

NAMES = {
    "eager": "eager",
    "compile": "`torch.compile`",
    "triton": "Triton",
    "topk": "`torch.topk`",
    "flashinfer": "flashinfer",
    "modal": "modAL",
    "small_text": "small-text",
    "cleanlab": "cleanlab",
    "unfused": "product and op",
    "one_hot": "the one-hot product",
    "cross_entropy": "`cross_entropy`",
    "linear_cross_entropy": "PyTorch's linear loss",
    "liger": "Liger",
    "cut_cross_entropy": "cut-cross-entropy",
    "neural_collapse": "neural-collapse",
    "WeightedRandom": "`WeightedRandomSampler`",
    "multinomial": "`torch.multinomial`",
    "randperm": "`torch.randperm`",
    "statistics": "`sample_statistics`",
    "product": "the bare product",
    "floor": "the floor",
}
# What does less than the op, so that the ratio is how much longer the op takes.
LOWER_BOUNDS = ("cross_entropy", "statistics", "randperm", "product", "floor")
# The README's rows: op, shape, dtype, and the shape in words.
OVERVIEW = [
    (
        *("select_minimal_margin", "1280 x 10 x 512", "float32"),
        "1,280 samples, 10 classes, 512 features",
    ),
    (
        *("select_minimal_margin", "8192 x 1000 x 2048", "float32"),
        "8,192 samples, 1,000 classes, 2,048 features",
    ),
    ("classification_margin", "1000000 x 100", "float32", "1,000,000 samples, 100 classes"),
    ("select_smallest", "1000000, k = 10000", "float32", "1,000,000 scores, k = 10,000"),
    ("sample_statistics", "8192 x 1000", "float32", "8,192 samples, 1,000 classes"),
    (
        *("linear_sample_statistics", "8192 x 768 x 32000", "bfloat16"),
        "8,192 samples, 768 features, 32,000 classes, bfloat16",
    ),
]
# What a user would run instead without `torch.compile`.
EAGER = ("eager", "topk", "linear_cross_entropy")

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
        lines += ["", f"### `{op}`, {dtype}", "", *table(shapes, copy_rate(rows))]
    return "\n".join(lines)


def overview(path: Path) -> str:
    """The README's table: the time of ours and of PyTorch, and their ratio."""
    rows = read_results(path)
    lines = []
    for op, shape, dtype, words in OVERVIEW:
        case = (op, shape, dtype)
        found = {r["provider"]: r for r in rows if (r["op"], r["shape"], r["dtype"]) == case}
        eager = next((found[name] for name in EAGER if name in found), None)
        if "marginops" not in found or eager is None:
            continue
        times_of_all = [found["marginops"], eager, found.get("compile")]
        cells = [milliseconds(time_of(row)) if row else "-" for row in times_of_all]
        quickest = min(time_of(row) for row in times_of_all[1:] if row)
        ratio = times(quickest / time_of(found["marginops"]))
        lines.append(markdown([f"`{op}`", words, *cells, ratio]))
    if not lines:
        return ""
    explanation = (
        "The ratio is the time of the faster PyTorch version divided by that of marginops. The "
        "PyTorch column of `select_smallest` shows `torch.topk`. That of "
        "`linear_sample_statistics` shows `linear_cross_entropy`, which computes only the loss."
    )
    header = ["Operation", "Input", "marginops", "PyTorch", "compiled PyTorch", "Ratio"]
    rule = "|---|---" + "|---:" * (len(header) - 2) + "|"
    return "\n".join([f"{where(rows)}. {explanation}", "", markdown(header), rule, *lines])


def where(rows: list[Row]) -> str:
    """On what machine and with what the results were measured."""
    first = rows[0]
    threads = "" if copy_rate(rows) else f", {first['threads']} threads"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{first['device']}{threads}, torch {first['torch']}, commit {commits}, {first['date']}"


def introduction(rows: list[Row]) -> str:
    """Where the results were measured, and what the columns are."""
    runs, copied = int(rows[0].get("runs") or 1), copy_rate(rows)
    median = f"the lowest median of {runs} runs" if runs > 1 else "the median"
    if not copied:
        return f"{where(rows)}. A time is {median}, with the interquartile range in brackets."
    copies = [row for row in rows if row["op"] == "copy"]
    least = min(copies, key=lambda row: float(row["mib_moved"]))
    rate = f"{copied * 2**20 / 1e9:.2f} TB/s"
    return (
        f"{where(rows)}. The first time is {median} of the GPU's times with a cold cache, with the "
        f'interquartile range in brackets. "Of a copy" is the share of the {rate} of a copy. '
        '"Whole call" is the median time until a call is done. "Faster than" gives two ratios: by '
        "the GPU's time and by the whole call. Measured in this way, a copy of "
        f"{least['shape']} takes {milliseconds(time_of(least))}."
    )


def table(shapes: dict[str, dict[str, Row]], copied: float | None) -> list[str]:
    """The lines of one op's table."""
    measured = dict.fromkeys(name for providers in shapes.values() for name in providers)
    others = [name for name in measured if name != "marginops"]
    slower = [name for name in others if name not in LOWER_BOUNDS]
    bounds = [name for name in others if name in LOWER_BOUNDS]
    all_rows = [row for providers in shapes.values() for row in providers.values()]
    with_memory = any(row.get("peak_mib") for row in all_rows)
    header = ["shape", "marginops", "MiB" if with_memory else "of a copy" if copied else "GB/s"]
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
    """Three digits, in s, ms or us."""
    if time >= 999.5:
        return f"{time / 1e3:.3g} s"
    return f"{time:.3g} ms" if time >= 1 else f"{time * 1e3:.3g} us"
