"""The engine of one machine: tasks in this process, or handed out to worker processes."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import pyarrow as pa
import torch

from .task import Job, Progress, run_task
from .worker import WorkerTracebackError, start_workers

if TYPE_CHECKING:
    from .plan import Task


class WorkerError(RuntimeError):
    """A worker process was killed, or it crashed."""


def default_workers(device: torch.device) -> int:
    """The number of usable GPUs if ``device`` is ``cuda``, 1 if it is one GPU, else of CPU cores.

    Processes of ``torchrun`` on this machine share them.
    """
    if device.type == "cpu":
        count = len(os.sched_getaffinity(0))
    elif device.index is not None:
        count = 1
    else:
        count = torch.get_device_module(device).device_count()
    return max(count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def run_tasks(
    job: Job, tasks: Sequence[Task], workers: int, progress: Progress | None = None
) -> None:
    """Run tasks, each with one thread that computes.

    An error in a task ends the run after the tasks that others are at.

    Args:
        job: What the tasks have in common.
        tasks: The tasks, in the order in which they begin.
        workers: The number of processes; 1 for this process alone.
        progress: It is called in this process.

    Raises:
        WorkerError: A worker was killed. The message names the task.
        DataError: A row cannot be read or scored.
        OutputError: The folder cannot be written.
    """
    workers = min(workers, len(tasks))
    if workers > 1:
        _hand_out(job, tasks, workers, progress)
        return
    with _one_thread():
        for task in tasks:
            run_task(job, task, progress)


def _hand_out(job: Job, tasks: Sequence[Task], workers: int, progress: Progress | None) -> None:
    server, control, connections = start_workers(job, workers)
    waiting, at_work = deque(tasks), dict[Connection, Task]()
    open_connections = set(connections)
    failure: Exception | None = None
    try:
        while open_connections:
            for connection in wait(open_connections):
                try:
                    kind, content = connection.recv()
                except (EOFError, OSError):
                    kind, content = "error", _death(connection)
                ...
    finally:
        ...


@contextmanager
def _one_thread() -> Iterator[None]:
    torch_threads, arrow_threads = torch.get_num_threads(), pa.cpu_count()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    try:
        yield
    finally:
        torch.set_num_threads(torch_threads)
        pa.set_cpu_count(arrow_threads)
