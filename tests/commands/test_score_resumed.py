"""Runs of the score command that end early, and runs of several processes."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

from helpers.processes import INSTALLED, PATIENCE, wait_until
from helpers.score_files import score
from helpers.scoring_runs import digests

MODULE = """
import os, time, torch

def model():
    return Slow()

class Slow(torch.nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        torch.nn.init.eye_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, inputs):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        return super().forward(inputs.float())
"""


def start(files, output, *options, seconds, launcher=()):
    """Start a process that runs the command with a slow model, one batch a task."""
    (files.folder / "slow.py").write_text(MODULE)
    arguments = [*launcher, "-m", "marginops", *slow_run(files, output), *options]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=files.folder,
        env=os.environ | {"PYTHONPATH": INSTALLED, "SECONDS_A_BATCH": str(seconds)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slow_run(files, output):
    return [
        *("score", files.data, "--model", "slow:model", "--column", "embedding"),
        *("--target", "label", "--select", 20, "--task-rows", 100, "--output", output),
    ]


@pytest.fixture
def finish_here(files, monkeypatch):
    """Runs the same command in this process, in which the model is fast."""
    monkeypatch.chdir(files.folder)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(output):
        return score(*slow_run(files, output)[1:], "--workers", 1)

    yield run
    sys.modules.pop("slow", None)


def test_the_same_command_again_scores_nothing_and_changes_no_byte(files, capsys):
    options = ("--target", "label", "--select", 9)
    assert files.run(*options) == 0
    first, before = capsys.readouterr(), digests(files.folder / "out")
    report = files.folder / "report.json"
    assert files.run(*options, "--json", report) == 0
    second = capsys.readouterr()
    assert second.err == "resumed: 700 of 700 rows are scored already\n" and first.err == ""
    assert digests(files.folder / "out") == before
    assert json.loads(report.read_text())["scored_rows"] == 0
    assert "rows/s" in first.out and "rows/s" not in second.out
    told = [line for line in first.out.splitlines() if "rows/s" not in line and line]
    assert [line for line in second.out.splitlines() if line][:-1] == told


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(files):
    options = ("--target", "label", "--id", "id", "--select", 9, "--label-issues", 5)
    assert files.run(*options) == 0
    assert files.run(*options, "--workers", 2, output="two") == 0
    assert digests(files.folder / "two") == digests(files.folder / "out")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_goes_on(files, finish_here, capsys, workers):
    process = start(files, "out", "--workers", workers, "--quiet", seconds=0.5)
    wait_until(lambda: (files.folder / "out/done/000001.json").exists())
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert error == (
        "marginops score: interrupted; finished tasks stay, and the same command goes on\n"
    )
    assert not (files.folder / "out/summary.json").exists()
    assert finish_here("out") == 0
    error = capsys.readouterr().err
    assert re.fullmatch("resumed: [1-6]00 of 700 rows are scored already\n", error), error
    assert finish_here("whole") == 0
    assert digests(files.folder / "out") == digests(files.folder / "whole")


@pytest.mark.slow
def test_a_killed_worker_is_told_in_one_line(files):
    psutil = pytest.importorskip("psutil")
    process = start(files, "out", "--workers", 2, "--quiet", seconds=0.5)
    wait_until(lambda: (files.folder / "out/done/000001.json").exists())
    descendants = psutil.Process(process.pid).children(recursive=True)
    next(child for child in descendants if not child.children()).kill()
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.fullmatch(
        r"marginops score: --workers: expected 2 processes that work, got one that was ended by "
        r"SIGKILL in task \d .*/[ab].parquet, row group \d.*\n",
        error,
    ), error


@pytest.mark.slow
def test_processes_of_torchrun_tell_the_results_once(files, finish_here):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    process = start(files, "out", seconds=0.05, launcher=launcher)
    printed, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert printed.count("selected: the 20 rows with the smallest margin") == 1
    assert printed.count("wrote out/figure.png") == 1
    assert "process 0 of 2: 400 rows in " in printed
    assert finish_here("alone") == 0
    assert digests(files.folder / "out") == digests(files.folder / "alone")
