"""The engine Ray: actors of a Ray cluster run the tasks.

The markers in the folder of the run are the checkpoint. They are written after the files of their
task, so each row stands in the output once. Ray Data can keep checkpoints too, of the ids of rows.
The markers need no column of ids, and the local engine goes on with what Ray began, and Ray with
what the local engine began.
"""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import torch

try:
    import ray
    import ray.data
except ModuleNotFoundError as error:
    if error.name != "ray":
        raise
    hint = 'run pip install "marginops[ray]"'
    raise ImportError(f"The engine Ray needs ray[data]; {hint}", name=error.name) from error

from ray.data.block import BlockMetadata
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .local import WorkerError, WorkerTracebackError
from .plan import Task
from .reading import read_task, rebatch, row_groups_text
from .task import Job, Progress, run_task, score_batches

# A task that begins once more after so many times ends the run. Otherwise a task that needs more
# memory than there is would kill actors for ever.
_STARTS = 4
# The bits of a matrix product depend on where in the memory its values begin.
_ALIGNED = pa.ipc.IpcReadOptions(ensure_alignment=pa.ipc.Alignment.At64Byte)
# Where actors read the files themselves, the object store holds little more than Ray's own objects.
_SMALL_STORE = 256 << 20


def run_on_ray(
    job: Job,
    tasks: Sequence[Task],
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    address: str | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> None:
    """Run tasks on a Ray cluster, with the results of the local engine, bit for bit.

    Each actor holds the scorer and computes with one thread. Without GPUs an actor also reads the
    files, in the memory that a worker of the local engine takes. With GPUs the reading is work of
    its own, on the CPUs of all nodes. A task then travels to its actor as a whole: each actor has up
    to three tasks in the object store, and each CPU that reads has one in its memory twice.

    Ray repeats what an actor or a node was at when it died. All machines must reach the files and
    the output folder under the same paths.

    Args:
        job: What the tasks have in common.
        tasks: The tasks, in the order in which they begin.
        workers: The number of actors. By default as many as the cluster has CPUs or GPUs for.
        progress: It is called in this process with the rows and bytes of each task.
        address: A cluster, such as ``"auto"`` or ``"HOST:PORT"``, which keeps running. By default the
            one that the variable ``RAY_ADDRESS`` names, else Ray starts on this machine and ends
            with the run. If this process is connected already, its cluster is used.
        num_cpus: The CPUs that Ray reserves for an actor; by default 1, and 0 with GPUs.
        num_gpus: The GPUs that Ray reserves for an actor; by default none.

    Raises:
        DataError: A row cannot be read or scored.
        OutputError: The folder cannot be written.
        WorkerError: Actors died in the same task again and again, or Ray itself failed.
        ConnectionError: There is no cluster at ``address``.
        ValueError: The cluster has no room for an actor.
    """
    if not tasks:
        return
    num_gpus = num_gpus or 0
    if num_cpus is None:
        num_cpus = 0 if num_gpus else 1
    with _cluster(address, None if num_gpus else _SMALL_STORE), _own_context():
        workers = _number_of_actors(workers, num_cpus, num_gpus)
        try:
            with closing(
                _results(job, tasks, min(workers, len(tasks)), num_cpus, num_gpus)
            ) as done:
                for result in done:
                    if result["error"]:
                        error, text = pickle.loads(result["error"])
                        raise error from WorkerTracebackError(text)
                    if progress is not None:
                        progress(result["rows"], result["bytes"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise WorkerError(
                f"engine: expected Ray to run all tasks, got {type(error).__name__}: {reason}; "
                "run again to do what is missing"
            ) from error


def _results(
    job: Job, tasks: Sequence[Task], workers: int, num_cpus: float, num_gpus: float
) -> Iterator[dict[str, Any]]:
    """What became of each task, in the order in which they end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    starts = (
        ray.remote(_Starts)
        .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)
        .remote()
    )
    if num_gpus:
        reading = _Reading(job, tasks, starts)
        dataset = ray.data.read_datasource(reading, override_num_blocks=len(tasks), num_cpus=1)
    else:
        rows = [{"task": task.index} for task in tasks]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    results = dataset.map_batches(
        _Actor,
        fn_constructor_args=(job, starts),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    batches = results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    with closing(iter(batches)) as iterator:
        for batch in iterator:
            yield from batch.to_pylist()


class _Actor:
    """Runs tasks, each of which arrives as one row."""

    def __init__(self, job: Job, starts: Any) -> None:
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        self._job, self._starts = job, starts

    def __call__(self, row: pa.Table) -> pa.Table:
        task = self._job.plan.tasks[row["task"][0].as_py()]
        error = row["error"][0].as_py() if "error" in row.column_names else b""
        done = Counter(rows=0, bytes=0)

        def count(rows: int, num_bytes: int) -> None:
            done.update(rows=rows, bytes=num_bytes)

        def run() -> None:
            _count_start(self._starts, task, "score")
            if "rows" in row.column_names:
                batches = pa.ipc.open_stream(row["rows"][0].as_buffer(), options=_ALIGNED)
                job = self._job
                score_batches(
                    task, batches, job.scorer, job.reductions, job.folder, count, scores=job.scores
                )
            else:
                run_task(self._job, task, count)

        error = error or _error_of(run)
        return pa.table(
            {"task": [task.index], **{k: [v] for k, v in done.items()}, "error": [error]}
        )


class _Reading(ray.data.Datasource):  # type: ignore[misc]
    """Reads each task into one row, which Ray cannot divide among actors."""

    def __init__(self, job: Job, tasks: Sequence[Task], starts: Any) -> None:
        super().__init__()
        self._job, self._tasks, self._starts = job, tasks, starts

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ray.data.ReadTask]:
        metadata = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        sizes = {file.path: file.num_bytes for file in self._job.plan.files}
        read = partial(
            _read,
            starts=self._starts,
            columns=self._job.scorer.columns,
            batch_rows=self._job.plan.batch_rows,
            schema=self._job.plan.schema,
        )
        return [
            ray.data.ReadTask(partial(read, task, sizes[task.path]), metadata)
            for task in self._tasks
        ]


def _read(
    task: Task,
    num_bytes: int,
    *,
    starts: Any,
    columns: Sequence[str],
    batch_rows: int,
    schema: pa.Schema,
) -> list[pa.Table]:
    sink = pa.BufferOutputStream()

    def run() -> None:
        _count_start(starts, task, "read")
        batches = rebatch(read_task(task, columns, batch_rows, num_bytes), batch_rows)
        with pa.ipc.new_stream(sink, schema) as stream:
            for batch in batches:
                stream.write_batch(batch)

    error = _error_of(run)
    content = sink.getvalue()
    offsets = pa.array([0, content.size], pa.int64()).buffers()[1]
    rows = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])
    return [pa.table({"task": [task.index], "rows": rows, "error": [error]})]


def _error_of(run: Callable[[], None]) -> bytes:
    """Run something. Its error goes to this process as data, since Ray rewrites messages."""
    try:
        run()
    except Exception as error:
        text = traceback.format_exc()
        try:
            content = pickle.dumps((error, text))
            pickle.loads(content)
        except Exception:
            content = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), text))
        return content
    return b""


class _Starts:
    """Counts how often each piece of work began. It is an actor of its own."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, str]] = Counter()

    def add(self, task: int, work: str) -> int:
        self._counts[task, work] += 1
        return self._counts[task, work]


def _count_start(starts: Any, task: Task, work: str) -> None:
    if ray.get(starts.add.remote(task.index, work)) > _STARTS:
        raise WorkerError(
            f"engine: expected processes that live, got {_STARTS} that died in task {task.index} "
            f"({task.path}, {row_groups_text(task)}); if memory is short, reserve more CPUs for an "
            "actor or take fewer workers; run again to do what is missing"
        )


def _number_of_actors(workers: int | None, num_cpus: float, num_gpus: float) -> int:
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    name, needed, there = ("num_gpus", num_gpus, gpus) if num_gpus else ("num_cpus", num_cpus, cpus)
    if workers is None:
        workers = int(there / needed)
        if workers < 1:
            raise ValueError(
                f"{name}: expected at most the {there:g} of the cluster, got {needed:g}"
            )
    if num_gpus and num_cpus and workers * num_cpus > cpus - 1:
        raise ValueError(
            f"num_cpus: expected {workers} actors to leave a CPU for reading, got {num_cpus:g} of "
            f"{cpus:g} CPUs for each; leave num_cpus out"
        )
    return workers


@contextmanager
def _cluster(address: str | None, store: int | None) -> Iterator[None]:
    """A connection to a cluster, which is opened unless there is one."""
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", connected):
            raise ValueError(
                f"address: expected the cluster to which this process is connected, {connected}, "
                f"got {address}; leave it out, or call ray.shutdown() before"
            )
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address, **quiet)
        else:
            # Ray sends statistics of its use unless this variable is 0.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            cores = len(os.sched_getaffinity(0))
            ray.init(
                "local", num_cpus=cores, object_store_memory=store, include_dashboard=False, **quiet
            )
    except ConnectionError as error:
        raise ConnectionError(
            f"address: expected a Ray cluster, got {address} without one; start it with ray start"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_context() -> Iterator[None]:
    """Settings of Ray Data for this run: quiet, and independent of the user's."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.checkpoint_config = None
    context.max_errored_blocks = 0
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
