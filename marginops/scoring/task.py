"""One task: its rows are read ahead, scored, and written behind."""

from __future__ import annotations

import copy
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import torch

from .errors import DataError
from .reading import read_task, rebatch, row_group_of
from .reductions.base import Reduction
from .scored import ScoredBatch
from .storage import shown

if TYPE_CHECKING:
    from .folder import RunFolder
    from .plan import Plan, Task
    from .scorer import Scorer

Progress = Callable[[int, int], None]
"""It is called with the rows and the bytes of each batch that is scored."""

_Item = TypeVar("_Item")
# Batches that wait for the thread that scores, and for the thread that writes.
_DEPTH = 2
_END: Any = object()
# What an error of the scorer says of a row.
_ROW = re.compile(r"row (\d+) of the batch")


@dataclass(frozen=True)
class Job:
    """What all tasks of a run have in common. It is picklable."""

    plan: Plan
    scorer: Scorer
    reductions: Sequence[Reduction]
    folder: RunFolder
    scores: bool


def run_task(job: Job, task: Task, progress: Progress | None = None) -> None:
    """Read a task, score it, and write its part, its states and its marker.

    A thread reads ahead, the calling thread scores, and a thread writes behind.

    Raises:
        DataError: A row cannot be read or scored. The message names the file and the row group.
        OutputError: The folder cannot be written.
    """
    rows = job.plan.batch_rows
    num_bytes = next(file.num_bytes for file in job.plan.files if file.path == task.path)
    batches = rebatch(read_task(task, job.scorer.columns, rows, num_bytes), rows)
    with _thread("read") as reader:
        score_batches(job, task, _read_ahead(batches, reader), progress)


def score_batches(
    job: Job, task: Task, batches: Iterable[pa.RecordBatch], progress: Progress | None = None
) -> None:
    """Score the batches of a task, and write its part, its states and its marker.

    Args:
        job: The run. Its reductions stay empty.
        task: The task.
        batches: Its rows, all but the last batch of the plan's ``batch_rows`` rows.
        progress: It is called after each batch.

    Raises:
        DataError: A row cannot be scored. The message names the file and the row group.
        OutputError: The folder cannot be written.
    """
    reductions = copy.deepcopy(list(job.reductions))
    counts: Counter[str] = Counter()
    features = any(reduction.needs_features for reduction in reductions)
    first_row = task.first_row
    with job.folder.open_task(task) as output, _thread("write") as writer:
        pending: deque[Future[None]] = deque()
        for batch in batches:
            try:
                scored = job.scorer.score(batch, first_row, features=features)
            except DataError as error:
                raise _located(error, task, first_row) from error
            first_row += len(batch)
            if job.scores:
                pending.append(writer.submit(output.write, _columns(scored)))
                if len(pending) > _DEPTH:
                    pending.popleft().result()
            for reduction in reductions:
                reduction.update(scored)
            counts.update(scored.counts)
            if progress is not None:
                progress(len(batch), batch.nbytes)
        for future in pending:
            future.result()
        output.finish({item.name: item.state() for item in reductions}, dict(counts))


def _located(error: DataError, task: Task, first_row: int) -> DataError:
    """The error of a batch that begins with row ``first_row``, with the place in the file."""
    found = _ROW.search(str(error))
    row = first_row + (int(found[1]) if found else 0)
    group, first_of_group = row_group_of(task, row)
    text = _ROW.sub(f"row {row - first_of_group} of the row group", str(error))
    return DataError(f"{shown(task.path)}, row group {group}: {text}")


def _columns(scored: ScoredBatch) -> pa.RecordBatch:
    columns: dict[str, Any] = {}
    if scored.ids is not None:
        columns["id"] = scored.ids
    if scored.target is not None:
        target = scored.target.numpy()
        columns["target"] = pa.array(target, mask=target == scored.ignore_index)
    columns.update((name, pa.array(values.numpy())) for name, values in scored.values.items())
    return pa.RecordBatch.from_pydict(columns)


@contextmanager
def one_gpu(device: torch.device, index: int) -> Iterator[None]:
    """Let ``cuda`` without a number be the GPU ``index``, counted around, inside the context."""
    if device.type == "cuda" and device.index is None:
        with torch.cuda.device(index % torch.cuda.device_count()):
            yield
    else:
        yield


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """A thread. What waits for it is given up where the context ends, also by an error."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=f"marginops-{name}")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _read_ahead(items: Iterable[_Item], thread: ThreadPoolExecutor) -> Iterator[_Item]:
    iterator = iter(items)
    pending = deque(thread.submit(next, iterator, _END) for _ in range(_DEPTH))
    while (item := pending.popleft().result()) is not _END:
        pending.append(thread.submit(next, iterator, _END))
        yield item
