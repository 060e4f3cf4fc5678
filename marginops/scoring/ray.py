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
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

try:
    import ray
    import ray.data
except ModuleNotFoundError as error:
    if error.name != "ray":
        raise
    hint = 'run pip install "marginops[ray]"'
    raise ImportError(f'engine="ray" needs ray[data]; {hint}', name=error.name) from error

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .. import _checks as checks
from .errors import WorkerError, WorkerTracebackError
from .local import usable_cores
from .plan import Task
from .ray_work import Actor, Reading, Starts
from .task import Job, Progress

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

    Each actor holds the scorer and computes with one thread. Without GPUs an actor reads the files
    too, in as much memory as a worker of the local engine. With GPUs, Ray reads tasks on the CPUs
    of all nodes, and a task travels to its actor as a whole. So each CPU that reads holds the
    columns of a task twice, and the object store holds up to three tasks for each actor.

    Ray repeats what an actor or a node was at when it died. All machines must see the files and the
    output folder under the same paths.

    Args:
        job: What the tasks have in common.
        tasks: The tasks, in the order in which they begin.
        workers: The number of actors. By default as many as the cluster has CPUs or GPUs for.
        progress: It is called in this process with the rows and bytes of each finished task.
        address: A cluster that runs and goes on running: ``"auto"`` or ``"HOST:PORT"``. By default
            the one that the variable ``RAY_ADDRESS`` names. Without it, Ray starts on this machine
            and ends with the run. A process that is connected to a cluster uses that one.
        num_cpus: The CPUs that Ray reserves for an actor; by default 1, and 0 with GPUs.
        num_gpus: The GPUs that Ray reserves for an actor; by default none.

    Raises:
        DataError: A row cannot be read or scored.
        OutputError: The folder cannot be written.
        WorkerError: A task ended its process again and again, or Ray itself failed.
        ConnectionError: There is no cluster at ``address``.
        TypeError, ValueError: An argument is wrong, or the cluster has no room for an actor.
    """
    num_gpus = _checked_share("num_gpus", 0 if num_gpus is None else num_gpus)
    num_cpus = _checked_share("num_cpus", (0 if num_gpus else 1) if num_cpus is None else num_cpus)
    if not num_gpus and not num_cpus:
        raise ValueError("num_cpus: expected more than 0 for an actor without GPUs, got 0")
    if not tasks:
        return
    with _cluster(address, None if num_gpus else _SMALL_STORE), _quiet():
        workers = min(_number_of_actors(workers, num_cpus, num_gpus), len(tasks))
        try:
            with closing(_results(job, tasks, workers, num_cpus, num_gpus)) as results:
                for result in results:
                    if result["error"]:
                        error, text = pickle.loads(result["error"])
                        raise error from WorkerTracebackError(text)
                    if progress is not None:
                        progress(result["rows"], result["bytes"])
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise WorkerError(
                f"engine: expected Ray to run all tasks, got {type(error).__name__}: {reason}; "
                "run again to do what is missing"
            ) from error


def _results(
    job: Job, tasks: Sequence[Task], workers: int, num_cpus: float, num_gpus: float
) -> Generator[dict[str, Any], None, None]:
    """What became of each task, in the order in which they end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    starts = ray.remote(Starts).options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    )
    starts = starts.remote()
    if num_gpus:
        reading = Reading(job, tasks, starts)
        rows = ray.data.read_datasource(reading, override_num_blocks=len(tasks), num_cpus=1)
    else:
        numbers = [{"task": task.index} for task in tasks]
        rows = ray.data.from_items(numbers, override_num_blocks=len(tasks))
    results = rows.map_batches(
        Actor,
        fn_constructor_args=(job, starts),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    # What the user allows in other data sets does not matter here.
    results.context.max_errored_blocks = 0
    results.context.enable_progress_bars = results.context.print_on_execution_start = False
    batches = results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    with closing(iter(batches)) as iterator:
        for batch in iterator:
            yield from batch.to_pylist()


def _checked_share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a number that is not negative, got {value}")
    return value


def _number_of_actors(workers: int | None, num_cpus: float, num_gpus: float) -> int:
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    name, share, total = ("num_gpus", num_gpus, gpus) if num_gpus else ("num_cpus", num_cpus, cpus)
    if share > total:  # Ray would wait for ever, whatever the number of workers
        raise ValueError(f"{name}: expected at most the {total:g} of the cluster, got {share:g}")
    workers = int(total / share) if workers is None else workers
    checks.check_int("workers", workers, 1)
    if num_gpus and num_cpus and workers * num_cpus > cpus - 1:
        raise ValueError(
            f"num_cpus: expected {workers} actors to leave one of {cpus:g} CPUs for reading, got "
            f"{num_cpus:g} for each; leave num_cpus out"
        )
    return workers


@contextmanager
def _cluster(address: str | None, object_store: int | None) -> Iterator[None]:
    """A connection to a cluster, which is opened unless there is one."""
    if ray.is_initialized():
        connected = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", connected):
            raise ValueError(
                f"address: expected {connected}, to which this process is connected, got "
                f"{address}; leave it out, or call ray.shutdown() before"
            )
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address or os.environ.get("RAY_ADDRESS"):
            ray.init(address, **quiet)
        else:
            # Ray reports its use to its makers unless this variable is 0.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                "local",
                num_cpus=usable_cores(),
                object_store_memory=object_store,
                include_dashboard=False,
                **quiet,
            )
    except ConnectionError as error:
        found = address or os.environ.get("RAY_ADDRESS")
        raise ConnectionError(
            f"address: expected a Ray cluster that runs, got none at {found}; begin one with "
            "ray start, or leave address out"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data tells the console nothing. Its errors are raised."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
