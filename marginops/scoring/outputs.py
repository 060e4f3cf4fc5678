"""Files that are there when they are complete."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from .errors import OutputError

_TEMPORARY = ".marginops-"
_WRITABLE = "make it writable"
_REASONS = {
    errno.ENOSPC: ("a full disk", "free space"),
    errno.EDQUOT: ("an exhausted quota", "free space"),
    errno.EACCES: ("no permission", _WRITABLE),
    errno.EPERM: ("no permission", _WRITABLE),
    errno.EROFS: ("a read-only file system", _WRITABLE),
}
# These create what leads to an object by themselves.
_OBJECT_STORES = ("s3", "gcs", "abfs")


@contextlib.contextmanager
def open_local(
    path: str, full_name: str, replace: bool = True, durable: bool = True
) -> Iterator[OutputFile]:
    """Write a local file under a temporary name in its folder, and rename it after the block.

    Args:
        path: The file.
        full_name: Its name for errors.
        replace: Whether it may replace another file. Without it, the first of several processes
            wins, and the folder is on the disk afterwards.
        durable: Whether the bytes are on the disk when the file is there.

    Raises:
        OutputError: The file cannot be written. Other errors of the block pass as they are.
    """
    folder = os.path.dirname(path)
    temporary = f"{folder}/{_TEMPORARY}{secrets.token_hex(8)}"
    with contextlib.ExitStack() as stack:
        with output_errors(full_name):
            os.makedirs(folder, exist_ok=True)
            stack.callback(_delete_if_there, temporary)
            file = open(temporary, "xb")  # noqa: SIM115
            stack.callback(_close_quietly, file)
        yield OutputFile(file, full_name)
        with output_errors(full_name):
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()
            _publish(temporary, path, replace)
            if not replace:
                _sync_folder(folder)


@contextlib.contextmanager
def open_object(filesystem: pafs.FileSystem, path: str, full_name: str) -> Iterator[OutputFile]:
    """Write a file of any file system in one stream. Most show it when the stream is closed.

    Raises:
        OutputError: The file cannot be written. Other errors of the block pass as they are.
    """
    with output_errors(full_name):
        if filesystem.type_name not in _OBJECT_STORES:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        file = filesystem.open_output_stream(path)
    try:
        yield OutputFile(file, full_name)
        with output_errors(full_name):
            file.close()
    except BaseException:
        # Closing shows what was written so far, so it goes.
        with contextlib.suppress(Exception):
            file.close()
        with contextlib.suppress(Exception):
            filesystem.delete_file(path)
        raise


@contextlib.contextmanager
def output_errors(full_name: str) -> Iterator[None]:
    """Turn an error of a file system into one that says which file, why, and what to do."""
    try:
        yield
    except OSError as error:
        text = " ".join(str(error).split())
        reason, remedy = _REASONS.get(error.errno or 0, (text, "remove the cause"))
        raise OutputError(
            f"output: expected a folder that can be read and written, got {reason} for "
            f"{full_name}; finished tasks stay, so {remedy} and run the same command again"
        ) from error


class OutputFile(io.RawIOBase):
    """A file that is being written."""

    def __init__(self, file: IO[bytes] | pa.NativeFile, full_name: str) -> None:
        self._file = file
        self._full_name = full_name

    def writable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The number of bytes so far."""
        return self._file.tell()

    def write(self, content: Any) -> int:
        """Append bytes.

        Raises:
            OutputError: The bytes cannot be written.
        """
        with output_errors(self._full_name):
            return self._file.write(content)


def is_temporary(name: str) -> bool:
    """Whether a file has a temporary name of :class:`Storage`."""
    return name.rpartition("/")[2].startswith(_TEMPORARY)


def _close_quietly(file: IO[bytes]) -> None:
    """Close a file. What it holds back is lost, because a full disk does not take it."""
    with contextlib.suppress(OSError):
        file.close()


def _delete_if_there(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _publish(temporary: str, path: str, replace: bool) -> None:
    try:
        if replace:
            os.replace(temporary, path)
        else:
            _link(temporary, path)
    except FileNotFoundError:
        # Another process finished the run and took the file for a left-over. It has seen the
        # complete file at ``path``, whose bytes are the same whoever writes them.
        if not os.path.exists(path):
            raise


def _link(temporary: str, path: str) -> None:
    """Rename a file unless the new name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # File systems without hard links.
        if not os.path.exists(path):
            os.replace(temporary, path)
        return
    os.unlink(temporary)


def _sync_folder(folder: str) -> None:
    """Bring a new name to the disk. Some file systems cannot, and lose nothing else by it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
