"""The standard streams of the command line: no character and no closed pipe ends in a traceback."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

# What a shell reports for a program that the signal ended.
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE


class StandardOutputError(Exception):
    """Standard output cannot be written. The cause is an OSError."""


def guard(body: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    Standard output is flushed here: at the end of the process Python would only print an error.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)
    try:
        with _writing():
            if sys.stdout is None:
                raise OSError(errno.EBADF, "it is closed")
        try:
            return body()
        finally:
            with _writing():
                sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except StandardOutputError as error:
        _discard(sys.stdout)
        if isinstance(error.__cause__, BrokenPipeError):
            return BROKEN_PIPE
        fail(f"marginops: {error}")
        return 1
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _discard(sys.stderr)


def say(text: str) -> None:
    """Print a text to standard output, at once."""
    with _writing():
        print(text, flush=True)


def fail(text: str) -> None:
    """Print an error to standard error, as one line."""
    line = "".join(part if part.isprintable() else _escaped(part) for part in text)
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise StandardOutputError(f"standard output cannot be written: {reason}") from error


def _discard(stream: TextIO | None) -> None:
    """Let the stream write nowhere, so that what it still holds is no error at the end."""
    # A stream that belongs to no file, as in a notebook, raises io.UnsupportedOperation.
    with contextlib.suppress(OSError):
        if stream is not None:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _escaped(text: str) -> str:
    """Text with an escape in place of every character, as in a literal of Python."""
    return text.encode("unicode_escape").decode("ascii")


def _replace(error: UnicodeError) -> tuple[str, int]:
    """The text that stands for characters which the encoding of a stream does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join("+-" if part == "±" else _escaped(part) for part in missing), error.end


_HANDLER = "marginops.replace"
codecs.register_error(_HANDLER, _replace)
