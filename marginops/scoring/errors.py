"""Errors of data, of output folders and of workers, and how errors leave a process."""

import pickle
import traceback


class DataError(ValueError):
    """The data, the head or the folder of a run is at fault. The message names the file."""


class OutputError(OSError):
    """The folder of a run cannot be written. What was finished before stays."""


class WorkerError(RuntimeError):
    """A worker process was killed, or it crashed."""


class WorkerTracebackError(Exception):
    """The traceback of an error in a worker, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def portable(error: BaseException) -> tuple[Exception, str]:
    """An error that any process can unpickle, and its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    if not isinstance(error, Exception):
        error = RuntimeError(f"a worker ended by {type(error).__name__}: {error}")
    return error, text
