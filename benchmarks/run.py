"""Measure all benchmarks: writes results/<device>.csv and the tables that are made of it.

python benchmarks/run.py             # measure, then write the results and the tables
python benchmarks/run.py --repeat 3  # measure three times, keep the lowest median of each benchmark
python benchmarks/run.py -k margin   # measure a part, by arguments of pytest; writes nothing
python benchmarks/run.py --tables    # only write the tables from the results
python benchmarks/run.py --check     # fail if the tables or the results are not as they should be
"""

import argparse
import csv
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from claims_page import finding_of_claim, overview_of_claims, sections_of_claims
from scoring_costs import costs
from tables import overview, read_results, tables, time_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
# For each page its generated parts, each with what makes it of a result file or of their folder.
PAGES = {
    "README.md": {"overview": overview},
    "docs/find_mislabelled.md": {"found": finding_of_claim},
    "docs/performance.md": {
        "tables": lambda path: tables(path, linear=False),
        "tables of the linear head": lambda path: tables(path, linear=True),
    },
    "docs/reproduced.md": {"overview": overview_of_claims, "claims": sections_of_claims},
    "docs/score_files.md": {"costs": costs},
    "docs/train_faster.md": {"gains": finding_of_claim},
}
# What a page shows, if not the results of all devices.
SHOWN = {
    "README.md": "amd-epyc-avx512.csv",
    "docs/find_mislabelled.md": "claims-label-issues.json",
    "docs/reproduced.md": ".",
    "docs/score_files.md": "claims-scoring.json",
    "docs/train_faster.md": "claims-train-faster.json",
}
# Other libraries run in a process of their own: a fault there must not end ours.
OTHER_LIBRARIES = (
    "flashinfer or liger or cut_cross_entropy or modal or small_text or cleanlab or neural_collapse"
)
CASE = ("op", "shape", "dtype", "provider")
FIELDS = [
    *("device", "threads", "torch", "marginops", "commit", "date", "runs"),
    *CASE,
    *("median_ms", "iqr_ms", "min_ms", "rounds", "gb_per_s"),
    *("peak_mib", "mib_moved", "gpu_ms", "gpu_iqr_ms"),
]

Result = dict[str, Any]


class RunError(Exception):
    """The benchmarks cannot run as asked; the text says why and what to do."""


def device_name() -> str:
    """The GPU's name, or the processor's with its instruction set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    processor = names[0] if names else platform.processor() or platform.machine()
    instruction_set = torch.backends.cpu.get_cpu_capability()
    limited = "limited to " if os.environ.get("ATEN_CPU_CAPABILITY") else ""
    return f"{processor}, {limited}{instruction_set}"


def git(*arguments: str) -> str | None:
    """What git says about the repository; None where it can say nothing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def written_by_a_run(path: str) -> bool:
    """Whether a file may differ from the commit: runs write it, and no benchmark reads it."""
    return path in PAGES or path.startswith("benchmarks/results/")


def clean_commit(copied_from: str | None = None) -> str:
    """The commit that is checked out without changes.

    Args:
        copied_from: The commit of a copy that has no ``.git``, as the user says.

    Raises:
        RunError: There are changes, or there is no telling what is checked out.
    """
    known = git("rev-parse", "--short", "HEAD")
    if known is None:
        if copied_from is None:
            raise RunError(
                f"{ROOT} is not a git repository, so the results would name no commit; "
                "pass --commit ID if this is an unchanged copy of a commit"
            )
        return copied_from
    if copied_from is not None:
        raise RunError("--commit is for copies without .git; here git knows the commit")
    # An entry is a letter for the index, one for the file, a blank and the path.
    entries = (git("status", "--porcelain", "--no-renames") or "").splitlines()
    changed = [entry for entry in entries if not written_by_a_run(entry[3:])]
    if changed:
        raise RunError(
            "results must belong to one commit, but the checkout has changes; "
            "commit or remove them first:\n" + "\n".join(changed)
        )
    return known.strip()


def measure(pytest_arguments: list[str], common: Result) -> tuple[list[Result], bool]:
    """Run benchmarks in one process; a row for each that passed, and whether all did."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
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
    rows: list[Result] = []
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


def parts() -> list[list[str]]:
    """For each process its arguments: one file, with and without the other libraries."""
    files = sorted(HERE.glob("bench_*.py"))
    others = [file for file in files if "peer(" in file.read_text()]
    return [
        *([str(file), "-k", f"not ({OTHER_LIBRARIES})"] for file in files),
        *([str(file), "-k", OTHER_LIBRARIES] for file in others),
    ]


def fastest(rows: Iterable[Result]) -> list[Result]:
    """For each benchmark the row with the lowest time.

    A machine that others use changes its speed from minute to minute, which would otherwise
    show in the ratios of benchmarks that ran minutes apart.
    """
    kept: dict[tuple[Any, ...], Result] = {}
    for row in rows:
        known = kept.setdefault(tuple(row[name] for name in CASE), row)
        if time_of(row) < time_of(known):
            kept[tuple(row[name] for name in CASE)] = row
    return list(kept.values())


def measure_all(repeat: int, copied_from: str | None) -> bool:
    """Measure everything and write the results; whether all benchmarks passed.

    The results are written after each process, so that a run that is ended keeps what it has.
    """
    commit = clean_commit(copied_from)
    import torch

    import marginops

    common = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "marginops": marginops.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "runs": repeat,
    }
    rows: list[Result] = []
    passed = True
    for _ in range(repeat):
        for arguments in parts():
            measured, all_passed = measure(arguments, common)
            if clean_commit(copied_from) != commit:
                raise RunError("another commit was checked out meanwhile; run again")
            rows = fastest([*rows, *measured])
            passed = passed and all_passed
            if rows:
                write_results(rows)
    print(f"wrote {result_file(device_name())}: {len(rows)} passed")
    return passed


def result_file(device: str) -> Path:
    """Where the results of a device are kept."""
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".csv")


def write_results(rows: list[Result]) -> None:
    """Write results in the place of those that their device had before."""
    path = result_file(rows[0]["device"])
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def with_tables(name: str) -> str:
    """A page with the tables of the result files that it shows, between their markers."""
    text = (ROOT / name).read_text()
    for part, make in PAGES[name].items():
        shown = [RESULTS / SHOWN[name]] if name in SHOWN else sorted(RESULTS.glob("*.csv"))
        made = [make(path) for path in shown if path.exists()]
        begin, end = f"<!-- {part} -->", f"<!-- /{part} -->"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = "\n\n".join([before + begin, *filter(None, made), end + after])
    return text


def problems() -> list[str]:
    """What is wrong with the results and the tables."""
    found = []
    for path in sorted(RESULTS.glob("*.csv")):
        rows = read_results(path)
        for field in ("commit", "device"):
            values = list(dict.fromkeys(row[field] for row in rows))
            if len(values) != 1 or not values[0]:
                found.append(f"{path.name}: expected one {field}, got {', '.join(values)}")
        if any("dirty" in row["commit"] for row in rows):
            found.append(f"{path.name}: results of a checkout with changes; measure again")
    for name in PAGES:
        if name in SHOWN and not (RESULTS / SHOWN[name]).exists():
            found.append(f"{name}: expected a file of results {SHOWN[name]}, got none")
        if with_tables(name) != (ROOT / name).read_text():
            found.append(f"{name}: not the tables of the results; run benchmarks/run.py --tables")
    return found


def main() -> int:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure N times")
    parser.add_argument("--commit", metavar="ID", help="the commit that this copy is one of")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    parser.add_argument("--check", action="store_true", help="only check results and tables")
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.repeat < 1:
        parser.error(f"--repeat: expected at least 1, got {arguments.repeat}")
    if arguments.check:
        found = problems()
        print("\n".join(found), file=sys.stderr, end="\n" if found else "")
        return 1 if found else 0
    if pytest_arguments:
        print("arguments for pytest: this may be a part, so results and tables stay as they are")
        return 0 if measure([str(HERE), *pytest_arguments], {})[1] else 1
    if not arguments.tables:
        try:
            passed = measure_all(arguments.repeat, arguments.commit)
        except RunError as error:
            print(f"benchmarks/run.py: {error}", file=sys.stderr)
            return 2
        if not passed:
            print("not all benchmarks passed: the tables stay as they are", file=sys.stderr)
            return 1
    for name in PAGES:
        (ROOT / name).write_text(with_tables(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
