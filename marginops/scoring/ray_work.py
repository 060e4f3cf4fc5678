"""What runs on the machines of a Ray cluster: reading and scoring of single tasks."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import torch
from ray.data.block import BlockMetadata

from .errors import WorkerError, portable
from .plan import Task
from .reading import read_task, rebatch, task_place
from .task import Job, run_task, score_batches

# How often the same work may begin. Without a limit, a task that needs more memory than there is
# would end processes for ever.
_STARTS = 4


class Actor:
    """Runs tasks, one for each row that it gets.

    A row has the number of the task. If the task was read elsewhere, it also has the ``rows`` of
    the task, or an ``error``.
    """

    def __init__(self, job: Job, starts: Any) -> None:
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        self._job, self._starts = job, starts

    def __call__(self, row: pa.Table) -> pa.Table:
        """Run the task, and return what became of it."""
        task = self._job.plan.tasks[row["task"][0].as_py()]
        done = {"rows": 0, "bytes": 0}

        def count(rows: int, num_bytes: int) -> None:
            done["rows"] += rows
            done["bytes"] += num_bytes

        def run() -> None:
            _count_start(self._starts, task, "scoring")
            job = self._job
            if "rows" not in row.column_names:
                run_task(job, task, count)
                return
            with pa.ipc.open_stream(row["rows"][0].as_buffer()) as batches:
                score_batches(job, task, batches, count)

        error = row["error"][0].as_py() if "error" in row.column_names else b""
        result = {"task": task.index, "error": error or _error_of(run), **done}
        return pa.Table.from_pylist([result])


class Reading(ray.data.Datasource):  # type: ignore[misc]
    """Reads each task into one row, which Ray cannot divide among actors."""

    def __init__(self, job: Job, tasks: Sequence[Task], starts: Any) -> None:
        super().__init__()
        self._job, self._tasks, self._starts = job, tasks, starts

    def estimate_inmemory_data_size(self) -> int | None:
        """Nothing is known before the data is read."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ray.data.ReadTask]:
        """One for each task, whatever the parallelism."""
        read = partial(
            _read,
            columns=self._job.scorer.columns,
            schema=self._job.plan.schema,
            batch_rows=self._job.plan.batch_rows,
            starts=self._starts,
        )
        sizes = {file.path: file.num_bytes for file in self._job.plan.files}
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ray.data.ReadTask(partial(read, task, sizes[task.path]), metadata)
            for task in self._tasks
        ]


def _read(
    task: Task,
    num_bytes: int,
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    batch_rows: int,
    starts: Any,
) -> list[pa.Table]:
    sink = pa.BufferOutputStream()

    def run() -> None:
        _count_start(starts, task, "reading")
        batches = rebatch(read_task(task, columns, batch_rows, num_bytes), batch_rows)
        with pa.ipc.new_stream(sink, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)

    error = _error_of(run)
    content = sink.getvalue()
    offsets = pa.array([0, content.size], pa.int64()).buffers()[1]
    rows = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])
    return [pa.table({"task": [task.index], "rows": rows, "error": [error]})]


class Starts:
    """Counts how often each piece of work began. It is an actor of its own."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, str]] = Counter()

    def add(self, task: int, work: str) -> int:
        """Count one more start."""
        self._counts[task, work] += 1
        return self._counts[task, work]


def _count_start(starts: Any, task: Task, work: str) -> None:
    if ray.get(starts.add.remote(task.index, work)) > _STARTS:
        raise WorkerError(
            f"engine: expected processes that work, got {_STARTS} that ended in task {task.index} "
            f"({task_place(task)}); if memory is short, take fewer workers; run again to do what "
            "is missing"
        )


def _error_of(run: Callable[[], None]) -> bytes:
    """Run something, and return its error as data. Ray would write its own words into it."""
    try:
        run()
    except Exception as error:
        return pickle.dumps(portable(error))
    return b""
