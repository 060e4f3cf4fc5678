"""Measure ``score_files`` beside bare reading, the bare product and scripts of users.

python benchmarks/claims/scoring.py                          # 1e7 rows in the page cache
python benchmarks/claims/scoring.py --rows 1e6 1e7 1e8 --cold --ray
python benchmarks/claims/scoring.py --quick                  # a few rows; writes nothing

Parquet files hold float16 embeddings of 128 features, labels of 100 classes and ids. Each job runs
in a process of its own. The jobs take turns, and their order is turned around in every other round.
The seconds of a job are those after its imports; ``process_seconds`` are those of the whole
process. The peak of the memory is that of all processes of a job, in a run whose time does not
count. Jobs that select have to choose the same rows.

"warm" files are in the page cache, and "cold" ones are taken out of it before each job. Files that
are larger than the free memory are always cold.

A run that was killed goes on where it was: the files and the measurements so far are in the folder
of the data. The folder is deleted at the end.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import scoring_data
import torch
from harness.machine import processor
from process_tree import run_measured

import marginops

HERE = Path(__file__).resolve().parent
FILE = HERE.parent / "results" / "claims-scoring.json"
RESERVE = 5 << 30  # bytes that stay free on the disk
JOBS = {
    "pyarrow, 1 thread": "read_with_one_thread",
    "pyarrow, a process a core": "read_with_processes",
    "pyarrow, scanner with threads": "read_with_scanner",
    "product, 1 thread": "multiply_with_one_thread",
    "product, a thread a core": "multiply_with_threads",
    "product, a process a core": "multiply_with_processes",
    "marginops, margin": "score_margin",
    "marginops, margin, no scores": "score_margin_alone",
    "marginops, minimal margin": "score_minimal_margin",
    "marginops, all statistics": "score_all_statistics",
    "marginops, margin, the command": "command",
    "marginops, margin, Ray": "score_with_ray",
    "PyTorch, topk at the end": "torch_topk_at_the_end",
    "PyTorch, running topk": "torch_running_topk",
    "pandas and NumPy": "pandas_and_numpy",
}
RAY = "marginops, margin, Ray"
OURS = "marginops, margin"
OTHER_SELECTION = "marginops, minimal margin"
READ, PRODUCT = "pyarrow, a process a core", "product, a process a core"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    settings = {**machine(), "rounds": options.rounds, "dictionary": options.dictionary}
    runs: list[Row] = []
    for rows in options.rows:
        folder = options.data_dir / f"{rows}-{'dictionary' if options.dictionary else 'plain'}"
        check_disk(folder, rows)
        print(f"{rows:,} rows in {folder}", flush=True)
        paths = scoring_data.make_files(folder, rows, options.dictionary)
        known = Known(folder / "runs.json", settings)
        for cache in caches(paths, options.cold):
            failed: set[str] = set()  # without a limit they would take all memory of the machine
            for name, number in turns(options.jobs, options.rounds):
                if name in failed:
                    continue
                row = known.row(cache, name, number)
                if row is None:
                    row = measured(name, folder, paths, rows, cache, number)
                    known.add(row)
                runs.append(row)
                if "failed" in row:
                    failed.add(name)
                print(sentence(row), flush=True)
        check_selections(folder)
        if not options.keep_data:
            shutil.rmtree(folder)
    results = {**settings, "ratios": ratios(runs), "runs": runs}
    print(summary(results))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {options.output}")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows",
        type=lambda text: int(float(text)),
        nargs="+",
        default=[10**7],
        help="numbers of rows, such as 1e6 1e7 (default: 1e7)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each job (3)")
    parser.add_argument("--cold", action="store_true", help="measure cold files as well")
    parser.add_argument("--ray", action="store_true", help="measure --engine ray as well")
    parser.add_argument(
        "--dictionary", action="store_true", help="files as pyarrow writes them by default"
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, help="measure some of the jobs")
    parser.add_argument("--quick", action="store_true", help="few rows, one round")
    parser.add_argument("--keep-data", action="store_true", help="delete nothing at the end")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "marginops-claims-scoring",
        help="folder of the files, 280 bytes a row (%(default)s)",
    )
    parser.add_argument("--output", type=Path, help="the result file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.rounds = [20_000], 1
    elif options.output is None:
        options.output = FILE
    options.jobs = options.jobs or [name for name in JOBS if options.ray or name != RAY]
    return options


def check_disk(folder: Path, rows: int) -> None:
    """Stop if the files would fill the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    # The scores of all rows take some of it too.
    needed = rows * (scoring_data.BYTES_PER_ROW + 100) - there + RESERVE
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"{folder}: expected {needed / 2**30:.0f} GiB of free disk, got {free / 2**30:.0f}"
        )


def caches(paths: list[Path], cold: bool) -> list[str]:
    """The states of the page cache to measure."""
    size = sum(path.stat().st_size for path in paths)
    if size > 0.7 * psutil.virtual_memory().available:
        return ["cold"]
    return ["warm", "cold"] if cold else ["warm"]


def turns(jobs: Sequence[str], rounds: int) -> Iterator[tuple[str, int]]:
    """Each job in each round; round 0 measures the memory."""
    for number in range(rounds + 1):
        for name in jobs if number % 2 else reversed(jobs):
            yield name, number


def measured(name: str, folder: Path, paths: list[Path], rows: int, cache: str, number: int) -> Row:
    """Run a job once; round 0 measures its memory, the others its time."""
    if cache == "warm":
        scoring_data.read_into_cache(paths)
    else:
        scoring_data.drop_from_cache(paths)
    cached = scoring_data.cached_share(paths)
    output = folder / "output"
    shutil.rmtree(output, ignore_errors=True)
    arguments = {
        "files": [str(path) for path in paths],
        "rows": rows,
        "head": str(folder / "head.safetensors"),
        "k": selected(rows),
        "output": str(output),
    }
    done = run_measured(
        [sys.executable, str(HERE / "scoring_jobs.py"), JOBS[name]],
        watch_memory=number == 0,
        limit=int(0.85 * psutil.virtual_memory().available),
        stdin=json.dumps(arguments),
    )
    size = sum(path.stat().st_size for path in paths)
    row: Row = {"rows": rows, "bytes": size, "cache": cache, "cached": cached}
    row |= {"job": name, "round": number}
    if number == 0:
        row["peak_mib"] = (done.peak_bytes or 0) / 2**20
    if done.above_limit:
        return row | {"failed": "more memory than there is"}
    if done.status < 0:
        return row | {"failed": f"killed by signal {-done.status}"}
    if done.status:
        sys.exit(f"{name} failed:\n{done.output}\n{done.errors}")
    if number:
        row["seconds"] = json.loads(done.output.splitlines()[-1])["seconds"]
        row["process_seconds"] = done.seconds
    chosen = output / "chosen.npy"
    if chosen.exists():
        chosen.replace(folder / f"chosen, {name}.npy")
    shutil.rmtree(output, ignore_errors=True)
    return row


def selected(rows: int) -> int:
    return min(100_000, max(1, rows // 100))


class Known:
    """The measurements so far, in a file."""

    def __init__(self, path: Path, settings: Row) -> None:
        self.path, self.settings, self.runs = path, settings, []
        if path.exists():
            content = json.loads(path.read_text())
            if {**content["settings"], "date": settings["date"]} == settings:
                self.runs = content["runs"]

    def row(self, cache: str, job: str, number: int) -> Row | None:
        wanted = (cache, job, number)
        for row in self.runs:
            if (row["cache"], row["job"], row["round"]) == wanted:
                return row
        return None

    def add(self, row: Row) -> None:
        self.runs.append(row)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"settings": self.settings, "runs": self.runs}))
        unfinished.replace(self.path)


def check_selections(folder: Path) -> None:
    """Compare what the jobs selected by margin. Sums in another order may change the last rows."""
    chosen = {
        path.stem.removeprefix("chosen, "): np.load(path) for path in folder.glob("chosen, *.npy")
    }
    chosen.pop(OTHER_SELECTION, None)
    for name, ids in chosen.items():
        first, expected = next(iter(chosen.items()))
        share = len(np.intersect1d(ids, expected)) / len(expected)
        if len(ids) != len(expected) or share < 0.999:
            sys.exit(f"{name} and {first} selected different rows: {share:.2%} are the same")


def ratios(runs: list[Row]) -> list[Row]:
    """Rates of ours against bare reading, the bare product and scripts, round by round.

    "reading, then product" is what two perfect programs would take one after the other on the same
    cores.
    """
    seconds = {
        (row["rows"], row["cache"], row["round"], row["job"]): row["seconds"]
        for row in runs
        if "seconds" in row
    }
    found: list[Row] = []
    for rows, cache in dict.fromkeys((row["rows"], row["cache"]) for row in runs):
        rounds = sorted({key[2] for key in seconds if key[:2] == (rows, cache)})
        times = [
            {key[3]: value for key, value in seconds.items() if key[:3] == (rows, cache, number)}
            for number in rounds
        ]
        for time in times:
            if READ in time and PRODUCT in time:
                time["reading, then product"] = time[READ] + time[PRODUCT]
        for ours in [name for name in JOBS if name.startswith("marginops")]:
            for other in [*(name for name in JOBS if name != ours), "reading, then product"]:
                values = [time[other] / time[ours] for time in times if {ours, other} <= {*time}]
                if values:
                    found.append(
                        {
                            **{"rows": rows, "cache": cache, "job": ours, "other": other},
                            "median": statistics.median(values),
                            "low": min(values),
                            "high": max(values),
                        }
                    )
    return found


def sentence(row: Row) -> str:
    """One measurement for the terminal."""
    text = f"{row['cache']}, round {row['round']}, {row['job']}: "
    if "failed" in row:
        return f"{text}{row['failed']}"
    if "seconds" not in row:
        return f"{text}{row['peak_mib']:,.0f} MiB"
    rate = row["rows"] / row["seconds"] / 1e6
    return f"{text}{row['seconds']:.2f} s, {rate:.2f} million rows a second"


def summary(results: Row) -> str:
    """Best rates with their spread, and memory, of all jobs."""
    lines = []
    for rows, cache in dict.fromkeys((row["rows"], row["cache"]) for row in results["runs"]):
        lines.append(f"\n{rows:,} rows, {cache}: million rows a second, best (worst); seconds; MiB")
        for name in JOBS:
            own = [
                row
                for row in results["runs"]
                if (row["rows"], row["cache"], row["job"]) == (rows, cache, name)
            ]
            times = [row["seconds"] for row in own if "seconds" in row]
            peak = [row["peak_mib"] for row in own if "peak_mib" in row]
            if times:
                best, worst = rows / min(times) / 1e6, rows / max(times) / 1e6
                lines.append(
                    f"  {name:32} {best:6.2f} ({worst:.2f})  {min(times):8.2f} s  {peak[0]:8,.0f}"
                )
            elif own:
                lines.append(f"  {name:32} {own[0].get('failed', 'not timed')}")
        for row in results["ratios"]:
            if (row["rows"], row["cache"], row["job"]) == (rows, cache, OURS):
                lines.append(
                    f"  {OURS} to {row['other']}: {row['median']:.2f} times the rate "
                    f"({row['low']:.2f} to {row['high']:.2f})"
                )
    return "\n".join(lines)


def machine() -> Row:
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
        "marginops": marginops.__version__,
        "features": scoring_data.FEATURES,
        "classes": scoring_data.CLASSES,
    }


if __name__ == "__main__":
    sys.exit(main())
