"""score_files: scores all rows of Parquet files, and keeps what its reductions keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _checks as checks
from . import worker
from .description import describe_run
from .finish import finish
from .folder import RunFolder
from .local import default_workers, run_tasks
from .plan import Task, make_plan
from .reductions.base import Reduction
from .task import Job, Progress

if TYPE_CHECKING:
    from .scorer import Scorer


def score_files(
    files: str | Path | Sequence[str | Path],
    scorer: Scorer,
    output: str | Path,
    *,
    reductions: Sequence[Reduction] = (),
    scores: bool = True,
    workers: int | None = None,
    engine: str = "local",
    task_rows: int = 262144,
    progress: Progress | None = None,
    address: str | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
) -> dict[str, Any] | None:
    """Score all rows of Parquet files, and write scores and reductions into a folder.

    The rows are divided into tasks, consecutive row groups of one file. Each finished task leaves
    its files and a marker in the folder. So a run that was ended, even by ``kill -9``, goes on
    where it was if the same call is made again. The files of the folder have the same bytes then.
    They do not depend on the number of workers either.

    With ``workers=1`` the work is done in this process. Otherwise new processes do it, each with
    one thread that computes. They do not run the script that calls this function, unless the scorer
    has a function of this script. Then the call must stand under ``if __name__ == "__main__":``.

    Processes of ``torchrun``, on one machine or on many, share the tasks if all see the folder:
    process ``RANK`` of ``WORLD_SIZE`` takes every ``WORLD_SIZE``-th task. The last one that is done
    merges the results.

    Each row is read once. The memory holds a few batches of at most 4 MiB for each worker and what
    the reductions keep, whatever the number of rows.

    Args:
        files: Paths, folders (all ``*.parquet`` files in them), patterns, and URLs of any of these.
        scorer: What computes the statistics of the rows.
        output: The folder of the run, a path or a URL: a new or empty one, or that of the same run.
        reductions: What to keep of all rows, such as ``[Smallest(1000)]``, each kind once. The
            objects themselves stay empty. :func:`read_result` reads what they kept.
        scores: Whether to write the statistics of all rows.
        workers: The number of processes. By default one for every two usable CPU cores, or for each
            GPU if the scorer's device is ``cuda``.
        engine: ``"local"`` for processes of this machine, ``"ray"`` for a Ray cluster.
        task_rows: The rows of a task, at least. Only the last task of a file may have fewer.
        progress: It is called in this process with the rows and the bytes of each scored batch. If
            it has a method ``start``, that is called first, with three numbers of rows: all rows,
            those that earlier calls finished, and those that this process will score.
        address: With ``engine="ray"``, a cluster that runs: ``"auto"`` or ``"HOST:PORT"``. By
            default the one that the variable ``RAY_ADDRESS`` names. Without it, Ray starts on this
            machine and ends with the run.
        num_cpus: With ``engine="ray"``, the CPUs that Ray reserves for each of the ``workers``; by
            default 1, and 0 with GPUs.
        num_gpus: With ``engine="ray"``, the GPUs that Ray reserves for each of the ``workers``; by
            default none.

    Returns:
        The content of ``summary.json``; None if other processes of ``torchrun`` are still at work.

    Raises:
        DataError: A file cannot be read or its rows cannot be scored (the message names the file
            and the row group), or the folder is that of another run.
        OutputError: The folder cannot be written, for example because the disk is full.
        WorkerError: A worker was killed. The message names its task.
        ConnectionError: There is no Ray cluster at ``address``.
        TypeError, ValueError: An argument has the wrong type or value.

    What is finished stays after any of these errors.

    Example:
        >>> import tempfile
        >>> import pyarrow as pa
        >>> import pyarrow.parquet as pq
        >>> from marginops.scoring import Scorer, Smallest, score_files
        >>> folder = tempfile.TemporaryDirectory()
        >>> files, output = f"{folder.name}/rows.parquet", f"{folder.name}/scores"
        >>> logits = pa.array([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]], pa.list_(pa.float32(), 3))
        >>> pq.write_table(pa.table({"id": [7, 8], "label": [0, 1], "logits": logits}), files)
        >>> scorer = Scorer(column="logits", target="label", id="id")
        >>> summary = score_files(files, scorer, output, reductions=[Smallest(1)], workers=1)
        >>> pq.read_table(f"{output}/selection.parquet").to_pylist()
        [{'id': 8, 'row': 1, 'margin': -1.0, 'target': 1}]
        >>> folder.cleanup()
    """
    checks.check_choice("engine", engine, ("local", "ray"))
    if workers is not None:
        checks.check_int("workers", workers, 1)
    of_ray = {"address": address, "num_cpus": num_cpus, "num_gpus": num_gpus}
    for name, value in of_ray.items():
        if engine != "ray" and value is not None:
            raise ValueError(
                f'{name}: expected none with engine="{engine}", got {value!r}; leave it out, or '
                'pass engine="ray"'
            )
    if worker.is_worker:
        raise RuntimeError(
            "score_files: expected a call in the main process, got one while a worker imports the "
            'script; put the call under if __name__ == "__main__":, or take workers=1'
        )
    job = make_job(files, scorer, output, reductions, scores=scores, task_rows=task_rows)
    finished = job.folder.finished()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tasks = [task for task in job.plan.tasks[rank::world_size] if task.index not in finished]
    start = getattr(progress, "start", None)
    if start is not None:
        done = [task for task in job.plan.tasks if task.index in finished]
        start(job.plan.num_rows, _num_rows(done), _num_rows(tasks))
    if engine == "ray":
        from .ray import run_on_ray

        run_on_ray(
            job,
            tasks,
            workers,
            progress,
            address=address,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
    else:
        run_tasks(job, tasks, workers or default_workers(job.scorer.device), progress)
    if len(job.folder.finished()) < len(job.plan.tasks):
        return None
    return finish(job.folder, job.plan, job.reductions)


def _num_rows(tasks: Sequence[Task]) -> int:
    return sum(task.num_rows for task in tasks)


def make_job(
    files: str | Path | Sequence[str | Path],
    scorer: Scorer,
    output: str | Path,
    reductions: Sequence[Reduction] = (),
    *,
    scores: bool = True,
    task_rows: int = 262144,
) -> Job:
    """Plan a run and open its folder. Arguments and errors are those of :func:`score_files`."""
    has_target = scorer.target is not None
    names = [getattr(reduction, "name", None) for reduction in reductions]
    for reduction in reductions:
        if not isinstance(reduction, Reduction):
            raise TypeError(
                f"reductions: expected a list of reductions, got {type(reduction).__name__} in it; "
                "pass objects such as Smallest(1000)"
            )
        name = type(reduction).__name__
        if names.count(reduction.name) > 1:
            raise ValueError(
                f"reductions: expected each kind once, got {name} {names.count(reduction.name)} "
                "times; make another run into another folder for the other one"
            )
        if reduction.needs_target and not has_target:
            raise ValueError(
                f"reductions: expected a scorer with labels for {name}, got one without; pass the "
                "name of their column as target"
            )
    reductions = [item.resolved(scorer.statistics[0], has_target=has_target) for item in reductions]
    wanted = [name for reduction in reductions for name in reduction.statistics]
    scorer = scorer.with_statistics(wanted)
    plan = make_plan(files, scorer, task_rows)
    folder = RunFolder.open(output, describe_run(scorer, plan, reductions, scores))
    return Job(plan, scorer, reductions, folder, scores)
