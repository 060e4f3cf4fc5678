"""One task: what it writes, and what remains of it after an error in any of its threads."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.processes import wait_until
from helpers.scoring_runs import rows_of_logits, write_parquet
from marginops.scoring import DataError, OutputError, Scorer, Smallest
from marginops.scoring import task as task_module
from marginops.scoring.folder import TaskWriter
from marginops.scoring.run import make_job
from marginops.scoring.task import Job, run_task, score_batches

ROWS, GROUP_ROWS, BATCH_ROWS = 1000, 150, 64
BATCHES = 5  # of the first task


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "rows.parquet", rows_of_logits(ROWS), GROUP_ROWS)


def job_of(file: Path, **options: Any) -> Job:
    scorer = Scorer(
        column="logits",
        target="label",
        id="id",
        statistics=("margin", "prediction"),
        batch_rows=BATCH_ROWS,
    )
    return make_job(file, scorer, file.parent / "out", [Smallest(20)], task_rows=300, **options)


def expected_margins(rows: pa.Table) -> np.ndarray[Any, Any]:
    logits = np.array(rows["logits"].to_pylist(), np.float32)
    label = rows["label"].fill_null(-100).to_numpy()
    margins = np.full(len(logits), np.inf, np.float32)
    for row in np.flatnonzero(label >= 0):
        others = np.delete(logits[row], label[row])
        margins[row] = logits[row, label[row]] - others.max()
    return margins


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "marginops" in thread.name]


def test_a_task_writes_scores_states_and_counts(file: Path) -> None:
    job, seen = job_of(file), []
    task = job.plan.tasks[1]
    run_task(job, task, lambda rows, size: seen.append((rows, size)))
    assert job.folder.finished() == {1}
    assert not threads()

    rows = pq.ParquetFile(file).read_row_groups(task.row_groups)
    scores = pq.read_table(file.parent / "out" / "scores" / "part-000001.parquet")
    assert scores.column_names == ["id", "target", "margin", "prediction"]
    assert scores["id"].equals(rows["id"])
    assert scores["target"].equals(rows["label"])
    margins = expected_margins(rows)
    np.testing.assert_array_equal(scores["margin"].to_numpy(), margins)
    selection = job.folder.state(task, "selection")
    assert sorted(selection["margin"].to_pylist()) == sorted(margins)[:20]
    assert min(selection["row"].to_pylist()) >= task.first_row
    assert job.folder.markers()[1]["counts"]["rows"] == task.num_rows
    assert job.folder.markers()[1]["counts"]["unlabelled"] == rows["label"].null_count

    assert [rows for rows, _ in seen] == [64, 64, 64, 64, 44]
    # An id, a label, and five float16.
    assert sum(size for _, size in seen) == pytest.approx(task.num_rows * (8 + 8 + 10), rel=0.02)


def test_a_task_without_scores_writes_the_rest(file: Path) -> None:
    job = job_of(file, scores=False)
    run_task(job, job.plan.tasks[0])
    assert job.folder.finished() == {0}
    assert not (file.parent / "out" / "scores").exists()


def test_reductions_of_the_job_stay_empty(file: Path) -> None:
    job = job_of(file)
    run_task(job, job.plan.tasks[0])
    assert job.reductions[0].state().num_rows == 0


def test_score_batches_takes_batches_of_anybody(file: Path) -> None:
    job, other = job_of(file), job_of(file.parent / "rows.parquet")
    task = job.plan.tasks[0]
    run_task(job, task)
    first = (file.parent / "out" / "scores" / "part-000000.parquet").read_bytes()
    batches = pq.ParquetFile(file).iter_batches(BATCH_ROWS, task.row_groups, job.scorer.columns)
    score_batches(other, task, batches)
    assert (file.parent / "out" / "scores" / "part-000000.parquet").read_bytes() == first


def damage_rows(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Exception], str]:
    column = pq.read_metadata(file).row_group(3).column(2)
    with open(file, "r+b") as opened:
        opened.seek(column.data_page_offset)
        opened.write(b"\xff" * 16)
    return DataError, f"{re.escape(str(file))}, row group 3: "


def fail_to_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Exception], str]:
    def reading(*arguments: Any) -> Iterator[pa.RecordBatch]:
        raise ZeroDivisionError("reading")
        yield

    monkeypatch.setattr(task_module, "read_task", reading)
    return ZeroDivisionError, "reading"


def fail_to_score(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Exception], str]:
    def score(*arguments: Any, **options: Any) -> None:
        raise ZeroDivisionError("scoring")

    monkeypatch.setattr(Scorer, "score", score)
    return ZeroDivisionError, "scoring"


def fail_to_reduce(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Exception], str]:
    def update(*arguments: Any) -> None:
        raise ZeroDivisionError("reducing")

    monkeypatch.setattr(Smallest, "update", update)
    return ZeroDivisionError, "reducing"


def fail_to_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[type[Exception], str]:
    def write(*arguments: Any) -> None:
        raise OutputError("writing")

    monkeypatch.setattr(TaskWriter, "write", write)
    return OutputError, "writing"


def fail_to_write_the_last_batch(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[type[Exception], str]:
    write = TaskWriter.write

    def wrong(writer: TaskWriter, scores: pa.RecordBatch) -> None:
        if len(scores) < BATCH_ROWS:
            time.sleep(0.1)
            raise OutputError("writing")
        write(writer, scores)

    monkeypatch.setattr(TaskWriter, "write", wrong)
    return OutputError, "writing"


@pytest.mark.parametrize(
    "break_something",
    [
        damage_rows,
        fail_to_read,
        fail_to_score,
        fail_to_reduce,
        fail_to_write,
        fail_to_write_the_last_batch,
    ],
)
def test_an_error_of_any_stage_comes_out_as_itself(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    break_something: Callable[[Path, pytest.MonkeyPatch], tuple[type[Exception], str]],
) -> None:
    job = job_of(file)
    kind, message = break_something(file, monkeypatch)
    with pytest.raises(kind, match=message):
        run_task(job, job.plan.tasks[1])
    assert not threads()
    assert job.folder.finished() == set()
    assert not list(file.parent.glob("out/**/*0001*"))


def test_an_interrupt_ends_a_task(file: Path) -> None:
    job = job_of(file)

    def interrupt(rows: int, size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_task(job, job.plan.tasks[0], interrupt)
    assert not threads()
    assert job.folder.finished() == set()
    run_task(job, job.plan.tasks[0])
    assert job.folder.finished() == {0}


def test_reading_runs_ahead_and_writing_behind(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is scored, others are read, but no more than the pipeline holds."""
    read, score, write = task_module.rebatch, Scorer.score, TaskWriter.write
    batches_read, batches_scored, ahead, most, names = 0, 0, [], [], set()

    def counted(*arguments: Any) -> Iterator[pa.RecordBatch]:
        nonlocal batches_read
        for batch in read(*arguments):
            batches_read += 1
            most.append(batches_read - batches_scored)
            names.add(threading.current_thread().name.split("_")[0])
            yield batch

    def waiting(*arguments: Any, **options: Any) -> Any:
        nonlocal batches_scored
        wait_until(lambda: batches_read >= min(batches_scored + 3, BATCHES))
        batches_scored += 1
        ahead.append(batches_read - batches_scored)
        return score(*arguments, **options)

    def written(*arguments: Any) -> None:
        names.add(threading.current_thread().name.split("_")[0])
        write(*arguments)

    monkeypatch.setattr(task_module, "rebatch", counted)
    monkeypatch.setattr(Scorer, "score", waiting)
    monkeypatch.setattr(TaskWriter, "write", written)
    job = job_of(file)
    run_task(job, job.plan.tasks[0])
    assert ahead == [2, 2, 2, 1, 0]
    assert max(most) == 3
    assert names == {"marginops-read", "marginops-write"}


def test_a_slow_writer_holds_up_the_rest(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score, write = Scorer.score, TaskWriter.write
    batches_scored, batches_written, behind = 0, 0, []

    def scored(*arguments: Any, **options: Any) -> Any:
        nonlocal batches_scored
        batches_scored += 1
        behind.append(batches_scored - batches_written)
        return score(*arguments, **options)

    def waiting(*arguments: Any) -> None:
        nonlocal batches_written
        wait_until(lambda: batches_scored >= min(batches_written + 3, BATCHES))
        write(*arguments)
        batches_written += 1

    monkeypatch.setattr(Scorer, "score", scored)
    monkeypatch.setattr(TaskWriter, "write", waiting)
    job = job_of(file)
    run_task(job, job.plan.tasks[0])
    assert max(behind) == 3  # one is scored, one is written, and one waits


@pytest.mark.parametrize(
    ("row", "group", "row_of_group"), [(0, 0, 0), (299, 1, 149), (460, 3, 10), (999, 6, 99)]
)
def test_a_wrong_row_is_named(tmp_path: Path, row: int, group: int, row_of_group: int) -> None:
    rows = rows_of_logits(ROWS)
    label = rows["label"].to_pylist()
    label[row] = 5
    rows = rows.set_column(1, "label", pa.array(label))
    file = write_parquet(tmp_path / "rows.parquet", rows, GROUP_ROWS)
    job = job_of(file)
    place = rf"{re.escape(str(file))}, row group {group}: .* in row {row_of_group} of the row group"
    with pytest.raises(DataError, match=place):
        for task in job.plan.tasks:
            run_task(job, task)
    assert job.folder.finished() == {task for task in range(4) if task < group // 2}


def test_rows_of_unequal_lengths_are_an_error_of_their_row_group(tmp_path: Path) -> None:
    logits = [[1.0, 2.0, 3.0]] * ROWS
    logits[470] = [1.0, 2.0]
    rows = pa.table({"logits": pa.array(logits, pa.list_(pa.float32()))})
    file = write_parquet(tmp_path / "rows.parquet", rows, GROUP_ROWS)
    job = make_job(file, Scorer(column="logits", batch_rows=64), tmp_path / "out", task_rows=1)
    place = f"{re.escape(str(file))}, row group 3: .*row 20 of the row group"
    with pytest.raises(DataError, match=place):
        for task in job.plan.tasks:
            run_task(job, task)
    assert job.folder.finished() == {0, 1, 2}


def test_one_gpu_is_only_asked_for_on_a_gpu_without_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            chosen.append(index)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device", Device)
    for device in ("cpu", "cuda:1", "cuda"):
        with task_module.one_gpu(torch.device(device), 4):
            pass
    assert chosen == [1]
