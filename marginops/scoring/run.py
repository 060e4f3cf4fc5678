"""score_files: scores all rows of Parquet files, and keeps what the reductions keep."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import worker
from .description import describe_run
from .finish import finish
from .folder import RunFolder
from .local import default_workers, run_tasks
from .plan import make_plan
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
    **options: Any,
) -> dict[str, Any] | None:
    job = make_job(files, scorer, output, reductions=reductions, scores=scores, task_rows=task_rows)
    finished = job.folder.finished()
    tasks = [task for task in job.plan.tasks if task.index not in finished]
    rank, world_size = (int(os.environ.get(n, d)) for n, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    tasks = [task for task in tasks if task.index % world_size == rank]
    run_tasks(job, tasks, workers or default_workers(scorer.device), progress)
    if len(job.folder.finished()) < len(job.plan.tasks):
        return None
    return finish(job.folder, job.plan, job.reductions)


def make_job(
    files: str | Path | Sequence[str | Path],
    scorer: Scorer,
    output: str | Path,
    *,
    reductions: Sequence[Reduction],
    scores: bool,
    task_rows: int,
) -> Job:
    reductions = [reduction.resolved(scorer.statistics[0]) for reduction in reductions]
    wanted = [name for reduction in reductions for name in reduction.statistics]
    scorer = scorer.with_statistics(wanted)
    plan = make_plan(files, scorer, task_rows)
    folder = RunFolder.open(output, describe_run(scorer, plan, reductions, scores))
    return Job(plan, scorer, reductions, folder, scores)
