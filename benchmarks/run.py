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

from tables import read_results, tables, time_of

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
FIELDS = [
    *("device", "threads", "torch", "marginops", "commit", "date"),
    *(
        "op",
        "shape",
        "dtype",
        "provider",
        "median_ms",
        "iqr_ms",
        "min_ms",
        "rounds",
        "gb_per_s",
        "peak_mib",
        "mib_moved",
        "gpu_ms",
        "gpu_iqr_ms",
    ),
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


def measure(pytest_arguments: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """Run the benchmarks; a row for each that passed, and whether all did."""
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
            f"--benchmark-max-time={0.1 if torch.cuda.is_available() else 0.25}",
            "--benchmark-min-rounds=3",
            "--benchmark-disable-gc",
            "--benchmark-columns=median",
        ]
        run = subprocess.run([*command, f"--benchmark-json={report}", *pytest_arguments])
        benchmarks = json.loads(report.read_text())["benchmarks"] if report.exists() else []
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
        for name in ("peak_mib", "mib_moved", "gpu_ms", "gpu_iqr_ms"):
            if name in what:
                figures[name] = f"{what.pop(name):.5g}"
        rows.append(common | what | figures)
    return rows, run.returncode == 0


def better(rows: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The results of a file, each replaced by that of ``rows`` where its median is lower.

    A machine that others use changes its speed from minute to minute, which would otherwise
    show in the ratios of benchmarks that ran minutes apart.
    """

    def what(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("op", "shape", "dtype", "provider"))

    known = {what(row): row for row in read_results(path)}
    for row in rows:
        kept = known.setdefault(what(row), row)
        if time_of(row) < time_of(kept):
            known[what(row)] = row
        elif not kept.get("peak_mib"):
            kept["peak_mib"] = row.get("peak_mib", "")
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


def readme_with_tables() -> str:
    """The README with the tables of every result file between their markers."""
    readme = README.read_text()
    for name, linear in (("benchmarks", False), ("benchmarks of the linear head", True)):
        text = "\n\n".join(tables(path, linear) for path in sorted(RESULTS.glob("*.csv")))
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, after = readme.split(begin)[0], readme.split(end)[1]
        readme = before + "\n".join((begin, text, end)) + after
    return readme


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
        rows, passed = measure(pytest_arguments)
        if not rows:  # all may have been skipped
            return not passed
        known = result_file(rows[0]["device"])
        if arguments.merge and known.exists():
            rows = better(rows, known)
        elif pytest_arguments and not arguments.merge:
            print("a run with arguments for pytest may be a part: results and README.md stay")
            return not passed
        print(f"wrote {write_results(rows)}")
        if not passed:
            print("not all benchmarks passed: README.md stays", file=sys.stderr)
            return 1
    README.write_text(readme_with_tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
