"""The table of what scoring files costs, made of the results of ``claims/scoring.py``."""

import json
from pathlib import Path
from typing import Any

SIZES = (10**8, 10**9)
COLUMNS = {
    "marginops, margin": "`score_files`",
    "pyarrow, a process a core": "pyarrow alone",
    "PyTorch, topk at the end": "a loop of PyTorch",
    "pandas and NumPy": "pandas and NumPy",
}

Row = dict[str, Any]


def costs(path: Path) -> str:
    """A line for each measured number of rows, and for those of ``SIZES`` that were not measured.

    The latter are extrapolated from the rate at the largest measured number of rows, and marked so.
    """
    results = json.loads(path.read_text())
    runs: list[Row] = results["runs"]
    cases = sorted({(row["rows"], row["cache"]) for row in runs})
    # Files of the sizes to come do not fit into the page cache.
    base = max(cases, key=lambda case: (case[0], case[1] == "cold"))
    lines = [
        f"| Rows | Files | {' | '.join(COLUMNS.values())} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for rows, cache in cases:
        cells = [_measured(runs, rows, cache, job) for job in COLUMNS]
        lines.append(f"| {rows:,}, {cache} | {_size(runs, rows)} | {' | '.join(cells)} |")
    for rows in SIZES:
        if all(case[0] != rows for case in cases):
            cells = [_extrapolated(runs, base, rows, job) for job in COLUMNS]
            lines.append(f"| {rows:,} | {_size(runs, rows)} | {' | '.join(cells)} |")
    times = "the only run" if results["rounds"] == 1 else f"the fastest of {results['rounds']} runs"
    about = (
        f"{results['processor']}, {results['cores']} cores, {results['memory_gib']} GiB; torch "
        f"{results['torch']}, pyarrow {results['pyarrow']}. Seconds are those of {times} "
        'without the imports, and GiB the peak of all processes. "Warm" files are in the page '
        'cache, "cold" ones are not. Times with ~ are extrapolated from the rate at '
        f"{base[0]:,} rows, {base[1]}; they were not measured."
    )
    return "\n".join(lines) + f"\n\n{about}"


def _measured(runs: list[Row], rows: int, cache: str, job: str) -> str:
    own = _own(runs, rows, cache, job)
    failed = [row["failed"] for row in own if "failed" in row]
    if failed:
        return failed[0]
    seconds = [row["seconds"] for row in own if "seconds" in row]
    if not seconds:
        return "not measured"
    peak = max(row["peak_mib"] for row in own if "peak_mib" in row)
    return f"{duration(min(seconds))}, {peak / 1024:.1f} GiB"


def _extrapolated(runs: list[Row], base: tuple[int, str], rows: int, job: str) -> str:
    own = _own(runs, *base, job)
    if any("failed" in row for row in own):
        return "more memory"
    seconds = [row["seconds"] for row in own if "seconds" in row]
    return f"~ {duration(min(seconds) * rows / base[0])}" if seconds else "not measured"


def _own(runs: list[Row], rows: int, cache: str, job: str) -> list[Row]:
    return [row for row in runs if (row["rows"], row["cache"], row["job"]) == (rows, cache, job)]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours with two digits."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _size(runs: list[Row], rows: int) -> str:
    """The size of files of so many rows. Random numbers can hardly be compressed."""
    gigabytes = max(row["bytes"] / row["rows"] for row in runs) * rows / 1e9
    return f"{gigabytes:,.0f} GB" if gigabytes >= 10 else f"{gigabytes:.2g} GB"
