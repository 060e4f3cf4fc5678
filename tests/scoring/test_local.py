"""Processes of one machine: who they are, what they share, how they end, and how they fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.processes import INSTALLED, PATIENCE, alive
from helpers.scoring_runs import children, digests, rows_of_logits, workers_of, write_parquet
from marginops.scoring import DataError, Moments, Scorer, Smallest, score_files
from marginops.scoring.local import default_workers

ROWS = 2000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "rows.parquet", rows_of_logits(ROWS), 200)


def scorer(**options: Any) -> Scorer:
    return Scorer(column="logits", target="label", id="id", batch_rows=256, **options)


def run(file: Path, name: str, **options: Any) -> dict[str, Any] | None:
    arguments = {"reductions": [Smallest(20)], "task_rows": 400} | options
    return score_files(file, scorer(), file.parent / name, **arguments)


def python(
    file: Path, text: str, name: str = "script.py", *, by_stdin: bool = False
) -> subprocess.Popen[str]:
    """Starts a script beside the file, whose path is its argument."""
    (file.parent / name).write_text(text)
    path = os.pathsep.join([INSTALLED, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-" if by_stdin else str(file.parent / name), str(file)],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if by_stdin:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        process.stdin = None
    return process


def test_workers_give_the_bytes_of_one_process(file: Path) -> None:
    calls: list[tuple[int, int]] = []
    assert run(file, "one", workers=1, progress=lambda *done: calls.append(done)) is not None
    alone = [sum(column) for column in zip(*calls, strict=True)]
    calls.clear()
    summary = run(file, "two", workers=2, progress=lambda *done: calls.append(done))
    assert digests(file.parent / "two") == digests(file.parent / "one")
    assert summary is not None
    assert summary["rows"]["rows"] == ROWS
    assert [sum(column) for column in zip(*calls, strict=True)] == alone
    assert alone[0] == ROWS


def test_a_finished_run_does_nothing_and_gives_the_summary_again(file: Path) -> None:
    class Progress:
        def start(self, *rows: int) -> None:
            started.append(rows)

        def __call__(self, rows: int, size: int) -> None:
            called.append(rows)

    started: list[tuple[int, ...]] = []
    called: list[int] = []
    summary = run(file, "out", workers=1, progress=Progress())
    assert (started, sum(called)) == ([(ROWS, 0, ROWS)], ROWS)
    called.clear()
    (file.parent / "out" / "done" / "000001.json").unlink()
    assert run(file, "out", workers=1, progress=Progress()) == summary
    assert (started[1:], sum(called)) == ([(ROWS, ROWS - 400, 400)], 400)
    called.clear()
    assert run(file, "out", workers=2, progress=Progress()) == summary
    assert (started[2:], called) == ([(ROWS, ROWS, 0)], [])


def test_threads_of_this_process_are_as_before(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    arrow = pa.cpu_count()
    run(file, "out", workers=1, progress=lambda *_: seen.append(-pa.cpu_count()))
    assert set(seen[1:-1]) == {-1}
    assert (seen[0], seen[-1]) == (1, 3)
    assert pa.cpu_count() == arrow


def test_the_default_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    counts = {"cpu": 3, "cuda": 4, "cuda:1": 1}
    for device, count in counts.items():
        assert default_workers(torch.device(device)) == count
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [default_workers(torch.device(device)) for device in counts] == [1, 2, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert [default_workers(torch.device(device)) for device in counts] == [1, 1, 1]


def test_ranks_share_the_tasks_and_the_last_one_finishes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(file, "alone", workers=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(file, "out", workers=1) is None
    found = sorted(path.name for path in (file.parent / "out" / "done").iterdir())
    assert found == ["000001.json", "000003.json"]
    assert not (file.parent / "out" / "summary.json").exists()
    monkeypatch.setenv("RANK", "0")
    assert run(file, "out", workers=1) == expected
    assert digests(file.parent / "out") == digests(file.parent / "alone")


def test_an_error_in_a_task_ends_the_run_and_keeps_what_is_finished(file: Path) -> None:
    rows = rows_of_logits(ROWS)
    label = rows["label"].to_pylist()
    label[1130] = 7
    write_parquet(file, rows.set_column(1, "label", pa.array(label)), 200)
    place = f"{re.escape(str(file))}, row group 5: .*row 130 of the row group"
    before = children(os.getpid())
    with pytest.raises(DataError, match=place) as raised:
        run(file, "out", workers=2)
    assert "in score_batches" in str(raised.value.__cause__)
    assert children(os.getpid()) == before
    done = {int(path.stem) for path in (file.parent / "out" / "done").iterdir()}
    assert {0, 1} <= done
    assert 2 not in done


def test_an_error_of_the_progress_ends_the_workers(file: Path) -> None:
    before = children(os.getpid())

    def progress(rows: int, size: int) -> None:
        raise ZeroDivisionError("progress")

    with pytest.raises(ZeroDivisionError, match="progress"):
        run(file, "out", workers=2, progress=progress)
    assert children(os.getpid()) == before


CALL = """
from marginops.scoring import Scorer, score_files
{function}
def call():
    scorer = Scorer({head} column="logits", target="label", statistics=["margin"])
    summary = score_files(sys.argv[1], scorer, sys.argv[1] + ".out", task_rows=1000, workers=2)
    print("rows:", summary["rows"]["rows"])
"""
HEAD = """
def head():
    return torch.eye(5), None
"""
PLAIN = "import sys\nprint('script')\n" + CALL.format(function="", head="") + "call()\n"
OF_SCRIPT = "import sys, torch\n" + CALL.format(function=HEAD, head="head, ")
GUARDED = OF_SCRIPT + 'if __name__ == "__main__":\n    call()\n'


@pytest.mark.parametrize("by_stdin", [False, True], ids=["file", "standard input"])
def test_a_plain_script_is_not_run_again(file: Path, by_stdin: bool) -> None:
    out, error = python(file, PLAIN, by_stdin=by_stdin).communicate(timeout=PATIENCE)
    assert error == ""
    assert out.splitlines() == ["script", f"rows: {ROWS}"]


def test_a_function_of_the_script_is_imported(file: Path) -> None:
    out, error = python(file, GUARDED).communicate(timeout=PATIENCE)
    assert error == ""
    assert out.splitlines() == [f"rows: {ROWS}"]


def test_a_function_of_a_script_without_guard_gives_one_error(file: Path) -> None:
    process = python(file, OF_SCRIPT + "call()\n")
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert out == ""
    last = error.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: score_files: expected a call in the main process, got ")
    assert 'put the call under if __name__ == "__main__":' in last


def test_a_function_that_workers_cannot_import_is_an_error(file: Path) -> None:
    process = python(file, OF_SCRIPT + "call()\n", by_stdin=True)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    last = error.strip().splitlines()[-1]
    assert last.startswith("TypeError: scorer: expected functions that other processes can import")

    class Own(Smallest):
        pass

    with pytest.raises(TypeError, match="expected functions that other processes can import"):
        run(file, "out", reductions=[Own(3)], workers=2)


ENDLESS = """
import time, torch
from torch import nn

class Endless(nn.Module):
    batches = 0

    def forward(self, logits):
        if self.batches:
            time.sleep(3600)
        self.batches += 1
        return logits

def make():
    return Endless()
"""
ENDLESSLY = """
import sys
from marginops.scoring import Scorer, score_files
scorer = Scorer(model="endless:make", column="logits", batch_rows=100)
score_files(
    sys.argv[1],
    scorer,
    sys.argv[1] + ".out",
    task_rows=1000,
    workers={workers},
    progress=lambda rows, size: print(rows, flush=True),
)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_all_processes(file: Path, workers: int) -> None:
    (file.parent / "endless.py").write_text(ENDLESS)
    process = python(file, ENDLESSLY.format(workers=workers))
    assert process.stdout is not None
    assert process.stdout.readline() == "100\n"
    started = workers_of(process.pid)
    assert len(started) == (workers if workers > 1 else 0)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=PATIENCE)[1]
    assert error.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert not any(map(alive, started))
    assert not list((file.parent / "rows.parquet.out").glob("done/*"))


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    code = r"""
import re, sys
from pathlib import Path
from marginops.scoring import Scorer, Smallest, score_files
scorer = Scorer(column="logits", target="label", id="id", batch_rows=4096)
score_files(sys.argv[1], scorer, sys.argv[1] + ".out", reductions=[Smallest(100)], workers=1)
print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    block = rows_of_logits(50_000, 32)
    sizes, peaks = [], []
    # Pools of memory keep some of what is freed, and are full after a few hundred thousand rows.
    for blocks in (6, 24):
        file, rows = tmp_path / f"{blocks}.parquet", pa.concat_tables([block] * blocks)
        pq.write_table(rows, file, row_group_size=len(rows), use_dictionary=False)
        sizes.append(rows.nbytes)
        out, error = python(file, code).communicate(timeout=PATIENCE)
        assert error == ""
        peaks.append(1024 * int(out))
    print(peaks, sizes)
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 3


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"workers": 0}, ValueError, "workers: expected at least 1, got 0"),
        ({"workers": 1.5}, TypeError, "workers: expected an int, got float"),
        ({"engine": "spark"}, ValueError, 'engine: expected "local" or "ray", got \'spark\''),
        (
            {"address": "auto"},
            ValueError,
            "address: expected none with engine=\"local\", got 'auto'; leave it out",
        ),
        ({"num_gpus": 1}, ValueError, 'num_gpus: expected none with engine="local", got 1'),
        ({"reductions": ["smallest"]}, TypeError, "reductions: expected a list of reductions, got"),
        (
            {"reductions": [Smallest(3), Smallest(4)]},
            ValueError,
            "reductions: expected each kind once, got Smallest 2 times",
        ),
        ({"task_rows": 0}, ValueError, "task_rows: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments(
    file: Path, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        run(file, "out", **options)
    assert not (file.parent / "out").exists()


def test_reductions_that_need_labels(file: Path) -> None:
    with pytest.raises(ValueError, match="reductions: expected a scorer with labels for Moments"):
        score_files(file, Scorer(column="logits"), file.parent / "out", reductions=[Moments()])
    assert not (file.parent / "out").exists()
