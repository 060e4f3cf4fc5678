"""Run all benchmarks: writes results/<device>.csv and the README's tables from it.

python benchmarks/run.py            # run, then write both
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

HERE = Path(__file__).resolve().parent
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


def run(pytest_arguments: list[str]) -> Path:
    """Run the benchmarks and write their results."""
    import torch

    import marginops

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider"]
        command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
        command += ["--benchmark-warmup=on", "--benchmark-disable-gc", "--benchmark-columns=median"]
        subprocess.run([*command, f"--benchmark-json={report}", *pytest_arguments], check=True)
        benchmarks = json.loads(report.read_text())["benchmarks"]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    common = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "marginops": marginops.__version__,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }
    rows = []
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
    stem = re.sub(r"[^a-z0-9]+", "-", common["device"].lower()).strip("-")
    path = HERE / "results" / f"{stem}.csv"
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
    lines = [
        f"{first['device']}{threads}, torch {first['torch']}, commit {first['commit']}, "
        f"{first['date']}; medians, in brackets the interquartile range."
    ]
    groups: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = row["op"], row["dtype"], row["shape"]
        groups.setdefault(key, {})[row["provider"]] = row
    previous = None
    for (op, dtype, shape), providers in groups.items():
        others = [provider for provider in providers if provider not in ("marginops", "floor")]
        has_floor = "floor" in providers
        if (op, dtype) != previous:
            previous = op, dtype
            header = [f"`{op}`, {dtype}", "marginops", "GB/s"]
            header += [f"faster than {NAMES[other]}" for other in others]
            header += ["time over the floor"] * has_floor
            lines += [
                "",
                "| " + " | ".join(header) + " |",
                "|---" + "|---:" * (len(header) - 1) + "|",
            ]
        ours = providers["marginops"]
        time = float(ours["median_ms"])
        cells = [shape, f"{milliseconds(time)} ({milliseconds(float(ours['iqr_ms']))})"]
        cells += [ours["gb_per_s"]]
        cells += [times(float(providers[other]["median_ms"]) / time) for other in others]
        if has_floor:
            cells += [f"{time / float(providers['floor']['median_ms']):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


NAMES = {"eager": "eager", "compile": "`torch.compile`", "topk": "`torch.topk`"}


def times(ratio: float) -> str:
    """One decimal for small ratios."""
    return f"{ratio:.1f} x" if ratio < 10 else f"{ratio:.0f} x"


def milliseconds(time: float) -> str:
    """Three digits, in ms or us."""
    return f"{time:.3g} ms" if time >= 1 else f"{time * 1e3:.3g} us"


def readme_with_tables() -> str:
    """The README with the tables of every result file between its markers."""
    paths = sorted((HERE / "results").glob("*.csv"))
    text = "\n\n".join(tables(path) for path in paths)
    begin, end = "<!-- benchmarks -->", "<!-- /benchmarks -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    return pattern.sub(lambda _: f"{begin}\n{text}\n{end}", README.read_text())


def main() -> int:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="only write the README's tables")
    parser.add_argument("--check", action="store_true", help="only compare the README's tables")
    arguments, pytest_arguments = parser.parse_known_args()
    if arguments.check:
        if readme_with_tables() != README.read_text():
            print("README.md: the tables are not those of benchmarks/results", file=sys.stderr)
            return 1
        return 0
    if not arguments.readme:
        print(f"wrote {run(pytest_arguments)}")
    README.write_text(readme_with_tables())
    return 0


if __name__ == "__main__":
    sys.exit(main())
