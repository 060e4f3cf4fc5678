"""The engine of one machine: tasks in this process, or handed out to worker processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import spawn
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from .errors import WorkerError, WorkerTracebackError
from .reading import task_place
from .task import Job, Progress, one_gpu, run_task

if TYPE_CHECKING:
    from .plan import Task


# The main process ends the workers, also after Ctrl-C. Modules are found where it finds them.
_SERVER = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.path[:] = {path}; "
    "from marginops.scoring.worker import serve; serve({ends})"
)


def default_workers(device: torch.device) -> int:
    """One for every two usable CPU cores, or one for each GPU if ``device`` is ``cuda``.

    A worker keeps two cores busy: one thread reads while another one scores. Processes of
    ``torchrun`` on this machine share the cores and GPUs.
    """
    if device.type == "cpu":
        count = usable_cores() // 2
    elif device.index is not None:
        count = 1
    else:
        count = torch.get_device_module(device).device_count()
    return max(count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def usable_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_gpu(workers: int) -> int:
    """The GPU of the first worker: each process of ``torchrun`` has others."""
    return int(os.environ.get("LOCAL_RANK", "0")) * workers


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
    with _one_thread(), one_gpu(job.scorer.device, _first_gpu(1)):
        for task in tasks:
            run_task(job, task, progress)


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


def _hand_out(job: Job, tasks: Sequence[Task], count: int, progress: Progress | None) -> None:
    workers = _Workers(job, count)
    waiting = deque(tasks)
    at_work: dict[Connection, Task] = {}
    failure: Exception | None = None
    try:
        connections = list(workers.connections)
        while connections:
            for connection in wait(connections):
                assert isinstance(connection, Connection)
                kind, content = workers.receive(connection, at_work.get(connection))
                if kind == "progress":
                    if progress is not None:
                        progress(*content)
                    continue
                at_work.pop(connection, None)
                if kind == "error":
                    failure = failure or content
                if waiting and failure is None:
                    at_work[connection] = waiting.popleft()
                    with contextlib.suppress(OSError):  # If it has ended, receive() tells.
                        connection.send(at_work[connection])
                else:
                    connections.remove(connection)
                    connection.close()
    finally:
        workers.close()
    if failure is not None:
        raise failure


def _pickled(job: Job) -> bytes:
    try:
        return pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise _not_importable(f"an error: {error}") from error


def _checked_script(script: dict[str, Any]) -> dict[str, Any]:
    """How to import the user's script. It may be a notebook or standard input."""
    path = script.get("init_main_from_path")
    if not script or (path is not None and not os.path.isfile(path)):
        raise _not_importable("one of a notebook or of standard input")
    return script


def _not_importable(found: str) -> TypeError:
    return TypeError(
        f"scorer: expected functions that other processes can import, got {found}; move them to "
        "the top of a module, or take workers=1"
    )


class _Workers:
    """Worker processes, seen from the process that hands out tasks."""

    def __init__(self, job: Job, count: int) -> None:
        setup = spawn.get_preparation_data("marginops-worker")
        script = {name: setup.pop(name) for name in list(setup) if name.startswith("init_main")}
        pickled = _pickled(job)
        if b"__main__" in pickled:
            # Otherwise the workers need not import the user's script.
            setup |= _checked_script(script)
        setup["authkey"] = bytes(setup["authkey"])
        content = pickle.dumps((setup, _first_gpu(count), pickled))
        pairs = [multiprocessing.Pipe() for _ in range(count + 1)]
        self._control, *self.connections = [ours for ours, _ in pairs]
        ends = [theirs.fileno() for _, theirs in pairs]
        path = [str(folder) for folder in setup["sys_path"]]
        self._exit_codes: dict[int, int] = {}
        self._server = subprocess.Popen(
            [spawn.get_executable(), "-c", _SERVER.format(path=path, ends=ends)],
            stdin=subprocess.PIPE,
            pass_fds=ends,
        )
        for _, theirs in pairs:
            theirs.close()
        assert self._server.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._server.stdin as stdin:
            stdin.write(content)

    def receive(self, connection: Connection, task: Task | None) -> tuple[str, Any]:
        """The next message of a worker: its kind, and its content."""
        try:
            kind, content = connection.recv()
        except (EOFError, OSError):
            return "error", self._death(connection, task)
        if kind == "error":
            error, text = content
            error.__cause__ = WorkerTracebackError(text)
            return kind, error
        return kind, content

    def close(self) -> None:
        """End the workers, whatever they are at."""
        for connection in (self._control, *self.connections):
            connection.close()
        self._server.wait()

    def _death(self, connection: Connection, task: Task | None) -> WorkerError:
        code = self._exit_code(self.connections.index(connection))
        cause = "ended" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            names = {number.value: number.name for number in signal.Signals}
            cause = f"was ended by {names.get(-code, f'signal {-code}')}"
        at_work = "before its first task"
        if task is not None:
            at_work = f"in task {task.index} ({task_place(task)})"
        return WorkerError(
            f"workers: expected {len(self.connections)} processes that work, got one that {cause} "
            f"{at_work}; if memory is short, take fewer workers; run again to do what is missing"
        )

    def _exit_code(self, index: int) -> int | None:
        """How a worker ended; None if the server has ended too."""
        with contextlib.suppress(EOFError, OSError):
            # The server tells it before the end of the worker's connection is seen.
            while index not in self._exit_codes:
                ended, code = self._control.recv()
                self._exit_codes[ended] = code
        return self._exit_codes.get(index)
