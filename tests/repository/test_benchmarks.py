"""How results are measured and shown: commits, tables and goals. And the Triton kernel."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LONG = "131072 x 1024 x 64"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """``load(name)``: a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def row(op: str, shape: str, provider: str, gpu_ms: float, mib: float = 0, peak: str = "") -> dict:
    figures = {"gpu_ms": str(gpu_ms), "gpu_iqr_ms": "0.001", "mib_moved": str(mib)}
    figures |= {"median_ms": str(gpu_ms + 0.02), "iqr_ms": "0.002", "peak_mib": peak}
    where = {"device": "a GPU", "threads": "16", "torch": "2", "commit": "abc", "date": "today"}
    what = {"op": op, "shape": shape, "dtype": "float32", "provider": provider}
    return where | what | figures


ROWS = [
    row("copy", "1 scalar", "ceiling", 0.002, 1e-5),
    row("copy", "256 MiB", "ceiling", 0.2, 512),
    row("copy", "2048 MiB", "ceiling", 1.28, 4096),  # 3200 MiB/ms
    row("minimal_margin_score", LONG, "marginops", 0.2, 608),  # 95 %
    row("minimal_margin_score", LONG, "eager", 2.0, 608),
    row("minimal_margin_score", f"{LONG}, tied", "marginops", 0.25, 608),  # 76 %
    row("select_minimal_margin", "1280 x 10 x 512", "marginops", 0.009),
    row("select_minimal_margin", "1280 x 10 x 512", "eager", 0.06),
    row("linear_sample_statistics", "8192 x 4096 x 128000", "marginops", 11, 0, "140"),
    row("linear_sample_statistics", "8192 x 4096 x 128000", "product", 10),
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "gpu.csv"
    write(path, ROWS)
    return path


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(rows)


def line_of(table: str, name: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_goals(load):
    table = load("goals").goals_table(ROWS)
    assert line_of(table, "scores, margins, statistics of long rows")[1:4] == [
        *(">= 90%", "1 of 2", "76%")
    ]
    assert line_of(table, "selection from a batch: GPU time")[2:4] == ["1 of 1", "9 us"]
    # By whole calls: 80 us to 29.
    assert line_of(table, "selection from a batch: whole call, to eager")[2:4] == [
        *("0 of 1", "2.76 x")
    ]
    assert line_of(table, "head: time over the product")[2:4] == ["0 of 1", "1.10 x"]
    assert line_of(table, "head: extra memory")[2:4] == ["1 of 1", "140 MiB"]
    assert line_of(table, "head: time, to Liger")[2] == "not measured"


def test_goals_need_a_ceiling(load):
    with pytest.raises(ValueError, match="rows: expected results of a GPU"):
        load("goals").goals_table(ROWS[3:])


def test_gpu_tables(load, results):
    tables: ModuleType = load("tables")
    text = tables.tables(results, linear=False)
    assert "3.36 TB/s" in text and "a copy of 1 scalar takes 2 us" in text and "`copy`" not in text
    wanted = ["200 us (1 us)", "95%", "220 us", "10 x, 9.2 x"]
    assert line_of(text, f"{LONG} ")[1:] == wanted
    head = line_of(tables.tables(results, linear=True), "8192")
    assert head[1:] == ["11 ms (1 us)", "140", "11 ms", "1.10"]


def test_overview_compares_with_the_faster_of_pytorch(load, results):
    compiled = row("select_minimal_margin", "1280 x 10 x 512", "compile", 0.018)
    write(results, [*ROWS, compiled])
    text = load("tables").overview(results)
    assert line_of(text, "`select_minimal_margin`")[2:] == ["9 us", "60 us", "18 us", "2.0 x"]
    write(results, ROWS[:3])
    assert load("tables").overview(results) == ""


def test_the_readme_shows_one_file_and_the_documentation_all(load, results, tmp_path, monkeypatch):
    run = load("run")
    write(tmp_path / "other.csv", [one | {"device": "another GPU"} for one in ROWS])
    (tmp_path / "docs").mkdir()
    for name, parts in run.PAGES.items():
        marks = "".join(f"<!-- {part} -->\nold\n<!-- /{part} -->\n" for part in parts)
        (tmp_path / name).write_text(marks)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setitem(run.SHOWN, "README.md", "gpu.csv")
    assert "another GPU" not in run.with_tables("README.md")
    assert "a GPU" in run.with_tables("README.md")
    assert "another GPU" in run.with_tables("docs/performance.md")
    monkeypatch.setitem(run.SHOWN, "README.md", "missing.csv")
    assert "README.md: expected a file of results missing.csv, got none" in run.problems()


@pytest.mark.parametrize("limit", ["", "default"])
def test_a_processor_is_named_with_its_instruction_set(limit):
    # In its own process, because torch reads the variable when it starts.
    code = "import torch, run; print(torch.backends.cpu.get_cpu_capability());"
    code += "print(run.device_name())"
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(BENCHMARKS)}
    if limit:
        environment["ATEN_CPU_CAPABILITY"] = limit
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    capability, name = done.stdout.splitlines()
    assert name.endswith(f", limited to {capability}" if limit else f", {capability}")
    assert ("limited" in name) == bool(limit)


def test_fastest_is_by_the_gpu_where_it_is_timed(load):
    slower = [one | {"gpu_ms": "9"} for one in ROWS[3:5]]
    faster = row("minimal_margin_score", LONG, "marginops", 0.1, 608)
    kept = load("run").fastest([*slower, *ROWS, faster])
    assert [one["gpu_ms"] for one in kept if one["shape"] == LONG] == ["0.1", "2.0"]
    assert len(kept) == len(ROWS)


@pytest.fixture
def repository(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of one source file and the files that a run writes, for ``run`` to look at."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    for name in ("source.py", "README.md", "docs/performance.md", "benchmarks/results/gpu.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(load("run"), "ROOT", tmp_path)
    return tmp_path


def test_results_name_a_clean_commit(load, repository):
    run = load("run")
    commit = run.clean_commit()
    assert len(commit) >= 7 and run.git("rev-parse", commit) == run.git("rev-parse", "HEAD")
    for name in ("README.md", "docs/performance.md", "benchmarks/results/gpu.csv"):
        (repository / name).write_text("new tables and results")
    (repository / "benchmarks/results/cpu.csv").write_text("a new machine")
    assert run.clean_commit() == commit
    with pytest.raises(run.RunError, match="--commit is for copies"):
        run.clean_commit("abc1234")


@pytest.mark.parametrize("name", ["source.py", "new.py", "README.md.py"])
def test_changes_are_refused(load, repository, name):
    (repository / name).write_text("changed")
    run = load("run")
    with pytest.raises(run.RunError, match=f"the checkout has changes.*\n.*{name}"):
        run.clean_commit()


def test_a_copy_without_git_needs_its_commit(load, tmp_path, monkeypatch):
    run = load("run")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(run.RunError, match="is not a git repository"):
        run.clean_commit()
    assert run.clean_commit("abc1234") == "abc1234"


PROVIDERS = """
import importlib, json, pathlib
found = set()
for file in pathlib.Path().glob("bench_*.py"):
    for name, function in vars(importlib.import_module(file.stem)).items():
        marks = getattr(function, "pytestmark", []) if name.startswith("bench_") else []
        for mark in marks:
            if mark.name == "parametrize" and "provider" in mark.args[0]:
                places = mark.args[0].replace(" ", "").split(",")
                for values in mark.args[1]:
                    values = getattr(values, "values", values)
                    found.add(values if len(places) == 1 else values[places.index("provider")])
print(json.dumps(sorted(found)))
"""


def test_every_provider_of_a_benchmark_has_a_name_in_the_tables(load):
    command = [sys.executable, "-c", PROVIDERS]
    run = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    providers = set(json.loads(run.stdout))
    assert {"eager", "topk", "product", "WeightedRandom", "statistics"} < providers
    assert providers - {"marginops"} <= load("tables").NAMES.keys()


def test_problems_of_results_and_tables(load, results, monkeypatch):
    run, root = load("run"), results.parent
    monkeypatch.setattr(run, "ROOT", root)
    monkeypatch.setattr(run, "RESULTS", root)
    monkeypatch.setattr(run, "PAGES", {"page.md": {"tables": load("tables").overview}})
    page = root / "page.md"
    page.write_text("before\n<!-- tables -->\nold\n<!-- /tables -->\nafter\n")
    assert run.problems() == [
        "page.md: not the tables of the results; run benchmarks/run.py --tables"
    ]
    page.write_text(run.with_tables("page.md"))
    assert run.problems() == []
    assert page.read_text().startswith("before\n<!-- tables -->\n\na GPU")
    assert page.read_text().endswith("|\n\n<!-- /tables -->\nafter\n")
    write(results, [*ROWS[1:], ROWS[0] | {"commit": "def"}])
    assert run.problems()[0] == "gpu.csv: expected one commit, got abc, def"
    write(results, [one | {"commit": "abc-dirty"} for one in ROWS])
    assert run.problems()[0] == "gpu.csv: results of a checkout with changes; measure again"


def scored(rows: int, job: str, **figures: object) -> dict:
    return {"rows": rows, "bytes": 270 * rows, "cache": "cold", "job": job} | figures


def test_costs_of_scoring_files(load, tmp_path):
    path = tmp_path / "scoring.json"
    about = {"processor": "a processor", "cores": 2, "memory_gib": 24, "rounds": 2}
    ours, pandas, read = "marginops, margin", "pandas and NumPy", "pyarrow, a process a core"
    runs = [
        scored(10**7, ours, seconds=7.04, round=1),
        scored(10**7, ours, seconds=6.0, round=2),
        scored(10**7, ours, peak_mib=900, round=0),
        scored(10**7, pandas, peak_mib=30_000, round=0, failed="more memory than there is"),
        scored(10**6, ours, seconds=1.0, round=1),
        scored(10**6, ours, peak_mib=700, round=0),
        scored(10**6, pandas, seconds=5.0, round=1),
        scored(10**6, pandas, peak_mib=4096, round=0),
        scored(10**6, read, seconds=0.25, round=1),
        scored(10**6, read, peak_mib=512, round=0),
    ]
    path.write_text(json.dumps({**about, "torch": "2", "pyarrow": "25", "runs": runs}))
    text = load("scoring_costs").costs(path)
    none = "not measured"
    assert line_of(text, "1,000,000, cold")[1:] == [
        *("0.27 GB", "1 s, 0.7 GiB", "0.25 s, 0.5 GiB", none, "5 s, 4.0 GiB")
    ]
    assert line_of(text, "10,000,000, cold")[1:] == [
        *("2.7 GB", "6 s, 0.9 GiB", none, none, "more memory than there is")
    ]
    # At the rate of the largest number of rows.
    assert line_of(text, "100,000,000")[1:] == ["27 GB", "~ 60 s", none, none, "more memory"]
    assert line_of(text, "1,000,000,000")[1:] == ["270 GB", "~ 10 min", none, none, "more memory"]
    assert "extrapolated from the rate at 10,000,000 rows, cold; they were not measured" in text
    assert "the fastest of 2 runs" in text
    runs.append(scored(10**8, ours, seconds=70.0, round=1))
    runs.append(scored(10**8, ours, peak_mib=910, round=0))
    path.write_text(json.dumps({**about, "torch": "2", "pyarrow": "25", "runs": runs}))
    text = load("scoring_costs").costs(path)
    assert line_of(text, "100,000,000, cold")[2] == "70 s, 0.9 GiB"
    assert "| 100,000,000 |" not in text


TRITON = """
import torch
from triton_score import triton_score

torch.manual_seed(0)
for rows, classes, features in ((7, 10, 512), (70, 100, 64), (3, 5000, 64), (2, 9000, 70)):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(rows, classes).to(dtype)
        weight = torch.randn(classes, features).to(dtype)
        for row in range(rows):
            first, second = torch.randperm(classes)[:2].tolist()
            logits[row, first], logits[row, second] = 96, 64
            distance = (weight[first].double() - weight[second].double()).norm()
            score = triton_score(logits[row : row + 1], weight).double()
            torch.testing.assert_close(score[0], 32 / distance, rtol=1e-5, atol=0)
        assert torch.equal(triton_score(logits, weight)[-1], score[0].float())
"""


def test_triton_score():
    """By Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", TRITON]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in run.stderr:
        pytest.skip("this Triton's interpreter does not work with this numpy")
    assert run.returncode == 0, run.stderr[-3000:]
