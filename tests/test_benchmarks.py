"""What is made of a GPU's results: tables, and which goals they reach. And the Triton kernel."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
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
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


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
    with pytest.raises(ValueError, match="rows: expected those of a GPU"):
        load("goals").goals_table(ROWS[3:])


def test_gpu_tables(load, results):
    tables: ModuleType = load("tables")
    text = tables.tables(results, linear=False)
    assert "3.36 TB/s" in text and "a copy of 1 scalar takes 2 us" in text and "`copy`" not in text
    wanted = ["200 us (1 us)", "95%", "220 us", "10 x, 9.2 x"]
    assert line_of(text, f"{LONG} ")[1:] == wanted
    head = line_of(tables.tables(results, linear=True), "8192")
    assert head[1:] == ["11 ms (1 us)", "140", "11 ms", "1.10"]


def test_merging_keeps_the_faster_by_the_gpu(load, results):
    new = [row("minimal_margin_score", LONG, "marginops", 0.1, 608), row("new", "1", "eager", 1)]
    merged = load("run").better(new, results)
    assert [one["gpu_ms"] for one in merged if one["shape"] == LONG] == ["0.1", "2.0"]
    assert len(merged) == len(ROWS) + 1


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
