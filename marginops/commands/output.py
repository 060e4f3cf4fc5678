"""The files that a command writes: checked before the training, written after it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
from pathlib import Path

# An existing file in a folder that takes no new file, or a file that is a mount point.
_NOT_REPLACEABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


class OutputError(Exception):
    """A file cannot be written. The message says why."""


def check(path: Path) -> None:
    """Try whether a file can be written to ``path``. Nothing remains of the trial.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        mode = _mode(path)
        if mode is None:
            descriptor, trial = _new_file(_target(path).parent)
            os.close(descriptor)
            trial.unlink()
            return
        if not (stat.S_ISREG(mode) or is_special(path)):
            kind = "folder" if stat.S_ISDIR(mode) else "socket or disk"
            raise OutputError(f"expected a file, got the {kind} {path}; choose another name")
        if not os.access(path, os.W_OK):
            raise OutputError(
                f"expected a file that you may write, got {path}; change its permissions"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not path.parent.is_dir():
            raise OutputError(
                f"expected a file in an existing folder, got {path}; "
                f"the folder {path.parent} does not exist; create it first"
            ) from error
        # ValueError: the path has characters that the encoding of the file system lacks.
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"expected a place where a file can be written, got {path} ({reason}); "
            "choose another place"
        ) from error


def is_special(path: Path) -> bool:
    """Whether ``path`` is a device, a pipe or a standard stream, to which bytes are appended."""
    mode = _mode(path)
    if mode is None:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or _standard_stream(path) is not None


def is_same(first: Path, second: Path) -> bool:
    """Whether two paths name one file, which need not exist yet."""
    if _mode(first) is not None and _mode(second) is not None:
        return os.path.samefile(first, second)
    return _target(first) == _target(second)


def write(path: Path, content: bytes) -> None:
    """Write a file. Another process sees the old file or the complete new one.

    A device, a pipe, and an existing file whose folder takes no new file are written in place.

    Raises:
        OSError: The file cannot be written. An existing file still has its old content, unless it
            had to be written in place.
    """
    stream = _standard_stream(path)
    if stream is not None:
        sys.stdout.flush()
        with open(stream, "wb", closefd=False) as file:
            file.write(content)
    elif is_special(path):
        path.write_bytes(content)
    else:
        try:
            _replace(_target(path), content)
        except OSError as error:
            if error.errno not in _NOT_REPLACEABLE or _mode(path) is None:
                raise
            path.write_bytes(content)


def _replace(target: Path, content: bytes) -> None:
    mode = _mode(target)
    descriptor, new = _new_file(target.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
        new.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def _new_file(folder: Path) -> tuple[int, Path]:
    """Create a file with a name of its own. Its permissions are those of any new file."""
    path = folder / f".marginops-{secrets.token_hex(8)}"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), path


def _mode(path: Path) -> int | None:
    """The type and permissions of what ``path`` leads to; None if there is nothing."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _target(path: Path) -> Path:
    """The path behind symbolic links, so that a link stays a link."""
    return Path(os.path.realpath(path))


def _standard_stream(path: Path) -> int | None:
    """The descriptor of standard output or standard error if ``path`` names its file."""
    for descriptor in (1, 2):
        # A closed stream has no file.
        with contextlib.suppress(OSError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
    return None
