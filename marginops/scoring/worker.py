"""Worker processes of one machine, seen from inside.

A server process imports everything once, and then forks the workers, before it has threads. So the
workers share its memory. The user's script is not run again, unless the job has an object of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import sys
import threading
import traceback
from collections.abc import Sequence
from multiprocessing import spawn
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pyarrow as pa
import torch

from .task import one_gpu, run_task

is_worker = False
"""Whether this process is a worker, or the server that forks them."""


def serve(ends: Sequence[int]) -> None:
    """Be the server: read the job from standard input, fork the workers and wait for them.

    Args:
        ends: File descriptors of connections to the main process: the server's own one, to which it
            tells how workers ended, and one for each worker.
    """
    global is_worker
    is_worker = True
    control, *connections = [Connection(end) for end in ends]
    try:
        setup, gpu, job = pickle.load(sys.stdin.buffer)
        torch.set_num_threads(1)
        pa.set_cpu_count(1)
        spawn.prepare(setup)
    except BaseException as error:
        connections[0].send(_failure(error))
        return
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    for index in range(len(connections)):
        arguments = control, connections, index, gpu + index, job
        processes.append(context.Process(target=_work, args=arguments))
        processes[-1].start()
    for connection in connections:
        connection.close()
    running = dict(enumerate(processes))
    while running:
        wait([process.sentinel for process in running.values()])
        for index, process in list(running.items()):
            if not process.is_alive():
                _send(control, (index, process.exitcode))
                del running[index]


def _work(
    control: Connection, connections: Sequence[Connection], index: int, gpu: int, pickled: bytes
) -> None:
    """Be a worker: run the tasks that arrive, and answer each."""
    connection = connections[index]
    for other in (control, *connections):
        # An end of file comes when nobody holds an end.
        if other is not connection:
            other.close()
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    try:
        job = pickle.loads(pickled)
        with one_gpu(job.scorer.device, gpu):
            connection.send(("ready", None))
            while True:
                run_task(job, tasks.get(), lambda *done: connection.send(("progress", done)))
                connection.send(("done", None))
    except BaseException as error:
        _send(connection, _failure(error))


def _receive(connection: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """Receive tasks. Where the main process closes the connection or ends, the worker ends too."""
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _send(connection: Connection, message: object) -> None:
    with contextlib.suppress(OSError):  # The main process may have ended.
        connection.send(message)


def _failure(error: BaseException) -> tuple[str, tuple[Exception, str]]:
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, Exception):
        error = RuntimeError(f"a worker ended by {type(error).__name__}: {error}")
    return "error", (error, text)
