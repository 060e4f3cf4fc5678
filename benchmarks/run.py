"""Run all benchmarks: writes results/<device>.csv and the README's tables from it.

python benchmarks/run.py            # run, then write both
python benchmarks/run.py -k margin  # run a part, by arguments of pytest; writes nothing
python benchmarks/run.py --readme   # only write the README's tables from the results
python benchmarks/run.py --check    # fail if the README's tables are not those of the results
"""

import argparse
import csv
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
FIELDS = [
    *("device", "threads", "torch", "marginops", "commit", "date"),
    *("op", "shape", "dtype", "provider", "median_ms", "iqr_ms", "min_ms", "rounds", "gb_per_s"),
]


def device_name() -> str:
    """The GPU's name, or the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """What of the repository is checked out; nothing where that cannot be told."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def measure(pytest_arguments: list[str]) -> list[dict[str, Any]]:
    """Run the benchmarks; a row for each."""
    import torch

    import marginops

    common = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "marginops": marginops.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider"]
        command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
        command += [
            "--benchmark-warmup=on",
            "--benchmark-max-time=0.25",
            "--benchmark-disable-gc",
            "--benchmark-columns=median",
        ]
        subprocess.run([*command, f"--benchmark-json={report}", *pytest_arguments], check=True)
        benchmarks = json.loads(report.read_text())["benchmarks"]
    rows: list[dict[str, Any]] = []
    for benchmark in benchmarks:
        what, stats = dict(benchmark["extra_info"]), benchmark["stats"]
        rate = what.pop("bytes_read") / stats["median"] / 1e9
        figures = {
            "median_ms": f"{stats['median'] * 1e3:.5g}",
            "iqr_ms": f"{stats['iqr'] * 1e3:.3g}",
            "min_ms": f"{stats['min'] * 1e3:.5g}",
            "rounds": stats["rounds"],
            "gb_per_s": f"{rate:.3g}",
        }
        rows.append(common | what | figures)
    return rows


def better(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The results of a file, each replaced by that of ``rows`` where its median is lower.

    A machine that others use changes its speed from minute to minute, which would otherwise
    show in the ratios of benchmarks that ran minutes apart.
    """

    def what(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("op", "shape", "dtype", "provider"))

    with path.open(newline="") as file:
        known = {what(row): row for row in csv.DictReader(file)}
    for row in rows:
        kept = known.setdefault(what(row), row)
        if float(row["median_ms"]) < float(kept["median_ms"]):
            known[what(row)] = row
    return list(known.values())


def result_file(device: str) -> Path:
    """Where the results of a device are kept."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")


def write_results(rows: list[dict[str, Any]]) -> Path:
    """Write the results of a whole run in the place of those of this device."""
    path = result_file(rows[0]["device"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def tables(path: Path) -> str:
    """Markdown tables of one result file: times of ours, and ratios to the others."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = rows[0]
    threads = "" if "NVIDIA" in first["device"] else f", {first['threads']} threads"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows if row["commit"]))
    lines = [
        f"{first['device']}{threads}, torch {first['torch']}, commits {commits}, "
        f"{first['date']}; the lowest median of several runs, in brackets its interquartile range."
    ]
    groups: dict[tuple[str, str], dict[str, dict[str, dict[str, str]]]] = {}
    for row in rows:
        shapes = groups.setdefault((row["op"], row["dtype"]), {})
        shapes.setdefault(row["shape"], {})[row["provider"]] = row
    for (op, dtype), shapes in groups.items():
        measured = dict.fromkeys(provider for row in shapes.values() for provider in row)
        others = [provider for provider in measured if provider not in ("marginops", "floor")]
        header = [f"`{op}`, {dtype}", "marginops", "GB/s"]
        header += [f"faster than {NAMES[other]}" for other in others]
        header += ["time over the floor"] * ("floor" in measured)
        lines += ["", markdown(header), "|---" + "|---:" * (len(header) - 1) + "|"]
        for shape, providers in shapes.items():
            cells = {"marginops": "-", "GB/s": "-"} | dict.fromkeys(measured, "-")
            ours = providers.get("marginops")
            if ours is not None:
                time, spread = float(ours["median_ms"]), float(ours["iqr_ms"])
                cells["marginops"] = f"{milliseconds(time)} ({milliseconds(spread)})"
                cells["GB/s"] = ours["gb_per_s"]
                for name in providers.keys() - {"marginops"}:
                    ratio = float(providers[name]["median_ms"]) / time
                    cells[name] = f"{1 / ratio:.2f}" if name == "floor" else times(ratio)
            columns = ["marginops", "GB/s", *others, *["floor"] * ("floor" in measured)]
            lines.append(markdown([shape, *(cells[column] for column in columns)]))
    return "\n".join(lines)


NAMES = {"eager": "eager", "compile": "`torch.compile`", "topk": "`torch.topk`"}


def markdown(cells: list[str]) -> str:
    """A row of a table."""
    return "| " + " | ".join(cells) + " |"


def times(ratio: float) -> str:
    """One decimal for small ratios."""
    return f"{ratio:.1f} x" if ratio < 10 else f"{ratio:.0f} x"


def milliseconds(time: float) -> str:
    """Three digits, in ms or us."""
    return f"{time:.3g} ms" if time >= 1 else f"{time * 1e3:.3g} us"


def readme_with_tables() -> str:
    """The README with the tables of every result file between its markers."""
    text = "\n\n".join(tables(path) for path in sorted(RESULTS.glob("*.csv")))
    begin, end = "<!-- benchmarks -->", "<!-- /benchmarks -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    return pattern.sub(lambda _: "\n".join(filter(None, (begin, text, end))), README.read_text())


def main() -> int:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="only write the README's tables")
    parser.add_argument(
        "--merge", action="store_true", help="keep the lower of the new and the known medians"
    )
    parser.add_argument("--check", action="store_true", help="only compare the README's tables")
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.check:
        if readme_with_tables() != README.read_text():
            print("README.md: the tables are not those of benchmarks/results", file=sys.stderr)
            return 1
        return 0
    if not arguments.readme:
        RESULTS.mkdir(exist_ok=True)
        rows = measure(pytest_arguments)
        if arguments.merge:
            rows = better(rows, result_file(rows[0]["device"]))
        elif pytest_arguments:
            print("a run with arguments for pytest may be a part: results and README.md stay")
            return 0
        print(f"wrote {write_results(rows)}")
    README.write_text(readme_with_tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
