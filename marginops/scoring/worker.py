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
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import spawn
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pyarrow as pa
import torch

from .errors import portable
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
        for connection in connections:
            _send(connection, ("error", portable(error)))
        return
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    for index in range(len(connections)):
        arguments = control, connections, index, gpu + index, job
        processes.append(context.Process(target=_work, args=arguments))
        processes[-1].start()
    # From here on there are threads, so nothing is forked any more.
    with ThreadPoolExecutor(len(processes)) as threads:
        joined = {threads.submit(process.join): index for index, process in enumerate(processes)}
        for future in as_completed(joined):
            index = joined[future]
            _send(control, (index, processes[index].exitcode))
            _shut_down(connections[index])


def _shut_down(connection: Connection) -> None:
    """Let the main process see the end of a connection, whoever else holds it.

    The server holds it, and so do processes that the worker forked. How the worker ended is told
    before.
    """
    # An OSError: the main process has closed the other end.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def _work(
    control: Connection, connections: Sequence[Connection], index: int, gpu: int, pickled: bytes
) -> None:
    """Be a worker: run the tasks that arrive, and answer each."""
    connection = connections[index]
    for other in (control, *connections):
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
        _send(connection, ("error", portable(error)))


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
