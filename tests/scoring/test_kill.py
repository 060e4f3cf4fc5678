"""Runs that are killed at any moment and started again end with the same bytes as others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import INSTALLED, PATIENCE, alive, wait_until
from helpers.scoring_runs import (
    ForkingScorer,
    children,
    digests,
    rows_of_logits,
    waiting,
    workers_of,
    write_parquet,
)
from marginops.scoring import (
    Margins,
    Moments,
    Scorer,
    Smallest,
    SmallestPerClass,
    SuspiciousLabels,
    WorkerError,
    score_files,
)

ROWS, TASK_ROWS, TASKS = 12_000, 2000, 18  # rows of each of three files
# A run that waits ends only by being killed, so it does not matter how long the test takes.
GATE_ROW, TASKS_BEFORE_GATE = 24_000, 12
TESTS = Path(__file__).resolve().parents[1]
COLUMNS: dict[str, Any] = {"column": "logits", "target": "label", "id": "id", "batch_rows": 512}
SCRIPT = f"""
import sys
from pathlib import Path
from helpers.scoring_runs import WaitingScorer
from marginops.scoring import (
    Margins, Moments, Smallest, SmallestPerClass, SuspiciousLabels, score_files
)

files, output, workers = sys.argv[1:]
scorer = WaitingScorer(**{COLUMNS}).behind(Path(output + ".gate"), {GATE_ROW})
reductions = [Smallest(500), SmallestPerClass(50), Margins(), Moments(), SuspiciousLabels(50)]
score_files(
    files, scorer, output, reductions=reductions, workers=int(workers), task_rows={TASK_ROWS}
)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index in range(3):
        write_parquet(folder / f"{index}.parquet", rows_of_logits(ROWS, seed=index), 1000)
    (folder / "run.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, str]:
    """The files of a run that nobody killed, of one process."""
    run(data, data / "expected")
    found = digests(data / "expected")
    assert sum(name.startswith("scores/") for name in found) == TASKS
    return found


def run(
    data: Path,
    output: Path,
    workers: int = 1,
    scorer: Scorer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs what the script runs, in this process and without a gate."""
    reductions = [Smallest(500), SmallestPerClass(50), Margins(), Moments(), SuspiciousLabels(50)]
    score_files(
        data,
        scorer or Scorer(**COLUMNS),
        output,
        reductions=reductions,
        workers=workers,
        task_rows=TASK_ROWS,
        progress=progress,
    )


def start(data: Path, output: Path, workers: int, *launcher: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([INSTALLED, str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, str(data / "run.py"), str(data), str(output), str(workers)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def gate_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.gate")


def markers(output: Path) -> int:
    return len(list(output.glob("done/0*.json")))


def end(process: subprocess.Popen[str]) -> str:
    """Waits for the end; returns what the process wrote to standard error."""
    return process.communicate(timeout=PATIENCE)[1]


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """Waits for a condition while a process is at work."""
    wait_until(lambda: process.poll() is not None or true(), every=0.001)
    assert process.poll() is None, end(process)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(
    data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(data, output, 3)
    wait_for(process, lambda: markers(output) >= 3)
    time.sleep(random.uniform(0, 0.03))
    os.killpg(process.pid, signal.SIGKILL)
    end(process)
    assert 3 <= markers(output) <= TASKS_BEFORE_GATE

    # Workers do not outlive a main process that is killed alone.
    process = start(data, output, 2)
    workers: list[int] = []

    def both_wait() -> bool:
        workers[:] = workers_of(process.pid)
        return len(workers) == 2 and {*workers} <= {*waiting(gate_of(output))}

    wait_for(process, both_wait)
    (server,) = children(process.pid)
    process.kill()
    end(process)
    wait_until(lambda: not any(map(alive, [server, *workers])))
    assert markers(output) == TASKS_BEFORE_GATE

    run(data, output)
    assert digests(output) == expected


def test_a_worker_that_is_killed_ends_the_run(
    data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output, before = tmp_path / "out", children(os.getpid())
    # A process that the worker forked lives on with all that the worker had open.
    scorer = ForkingScorer(**COLUMNS).behind(gate_of(output))
    workers: list[int] = []

    def kill(rows: int, size: int) -> None:
        if not workers:
            workers.extend(workers_of(os.getpid()))
            killed = waiting(gate_of(output))[0]
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: not alive(killed))

    message = (
        "workers: expected 2 processes that work, got one that was ended by SIGKILL in task "
        rf"\d+ \({data}/\d.parquet, row groups \d+ to \d+\); if memory is short, take fewer"
    )
    try:
        with pytest.raises(WorkerError, match=message):
            run(data, output, 2, scorer, kill)
    finally:
        (gate_of(output) / "open").touch()
    # The other worker ended its task, and may have got one more.
    assert markers(output) <= 3
    assert len(workers) == 2
    assert not any(map(alive, workers))
    assert children(os.getpid()) == before
    run(data, output)
    assert digests(output) == expected


@pytest.mark.slow
def test_processes_of_torchrun(data: Path, expected: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(data, output, 1, *torchrun)
    wait_for(process, lambda: len(waiting(gate_of(output))) == 2)
    assert markers(output) == TASKS_BEFORE_GATE
    (gate_of(output) / "open").touch()
    error = end(process)
    assert process.returncode == 0, error
    assert digests(output) == expected
