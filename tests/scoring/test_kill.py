"""Runs that are killed at any moment and started again end with the same bytes as others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.processes import INSTALLED, PATIENCE, alive, wait_until
from helpers.scoring_runs import (
    children,
    digests,
    rows_of_logits,
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
    score_files,
)

TASKS = 20
SCRIPT = """
import sys
from marginops.scoring import (
    Margins, Moments, Scorer, Smallest, SmallestPerClass, SuspiciousLabels, score_files
)

files, output, workers = sys.argv[1:]
scorer = Scorer(column="logits", target="label", id="id", batch_rows=1024)
reductions = [Smallest(500), SmallestPerClass(50), Margins(), Moments(), SuspiciousLabels(50)]
score_files(
    files, scorer, output, reductions=reductions, workers=int(workers), task_rows=10_000
)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for index in range(4):
        write_parquet(folder / f"{index}.parquet", rows_of_logits(50_000, seed=index), 5000)
    (folder / "run.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def expected(data: Path) -> dict[str, str]:
    """The files of a run that nobody killed, of one process."""
    score_files(
        data,
        Scorer(column="logits", target="label", id="id", batch_rows=1024),
        data / "expected",
        reductions=[
            Smallest(500),
            SmallestPerClass(50),
            Margins(),
            Moments(),
            SuspiciousLabels(50),
        ],
        workers=1,
        task_rows=10_000,
    )
    found = digests(data / "expected")
    assert sum(name.startswith("scores/") for name in found) == TASKS
    return found


def start(data: Path, output: Path, workers: int, *launcher: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([INSTALLED, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, str(data / "run.py"), str(data), str(output), str(workers)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def markers(output: Path) -> int:
    return len(list(output.glob("done/0*.json")))


def wait_for_tasks(process: subprocess.Popen[str], output: Path, tasks: int) -> bool:
    """Waits until so many tasks are done; returns whether the process is still at work then."""
    deadline = time.monotonic() + PATIENCE
    while markers(output) < tasks and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return process.poll() is None


def end(process: subprocess.Popen[str]) -> str:
    """Waits for the end; returns what the process wrote to standard error."""
    return process.communicate(timeout=PATIENCE)[1]


def test_a_run_that_is_killed_again_and_again(
    data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    moments, output, kills = random.Random(0), tmp_path / "out", 0
    for workers in (2, 3, 2):
        tasks = markers(output) + moments.randint(0, 5)
        process = start(data, output, workers)
        if wait_for_tasks(process, output, tasks):
            time.sleep(moments.uniform(0, 0.03))
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        end(process)
    assert kills >= 2
    process = start(data, output, 3)
    assert end(process) == ""
    assert process.returncode == 0
    assert digests(output) == expected


def test_a_worker_that_is_killed_ends_the_run(
    data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(data, output, 2)
    assert wait_for_tasks(process, output, 2)
    workers = workers_of(process.pid)
    # It waits in the middle of a task until it is killed.
    os.kill(workers[0], signal.SIGSTOP)
    wait_until(lambda: markers(output) >= TASKS - 1)
    os.kill(workers[0], signal.SIGKILL)
    killed = time.monotonic()
    error = end(process)
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    assert (
        "WorkerError: workers: expected 2 processes that work, got one that was ended by" in error
    )
    assert "SIGKILL in task " in error
    assert ".parquet, row groups " in error
    assert not any(map(alive, workers))
    process = start(data, output, 1)
    assert end(process) == ""
    assert digests(output) == expected


def test_workers_end_with_a_main_process_that_is_killed(
    data: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(data, output, 2)
    assert wait_for_tasks(process, output, 1)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    end(process)
    wait_until(lambda: not any(map(alive, workers)))
    done = markers(output)
    assert done < TASKS
    time.sleep(0.2)
    assert markers(output) == done
    process = start(data, output, 2)
    assert end(process) == ""
    assert digests(output) == expected


def test_processes_of_torchrun(data: Path, expected: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(data, output, 1, *torchrun)
    assert wait_for_tasks(process, output, 4)
    rank = children(process.pid)[0]
    os.kill(rank, signal.SIGKILL)
    end(process)
    assert process.returncode == 1
    assert markers(output) < TASKS
    process = start(data, output, 1, *torchrun)
    end(process)
    assert process.returncode == 0
    assert digests(output) == expected
