"""Files of a run, on the local disk or on any file system that pyarrow or fsspec knows."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from .errors import DataError, OutputError

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


def resolve(location: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path in it.

    Args:
        location: A local path; a URI that pyarrow knows, such as ``file://``, ``s3://`` or
            ``gs://``; or any other URL that fsspec knows, such as ``memory://`` or ``abfs://``.

    Raises:
        DataError: Neither pyarrow nor fsspec knows the file system, or it cannot be reached.
    """
    text = os.fspath(location)
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        return pafs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        # A pyarrow that was built without a file system raises ArrowNotImplementedError.
        if "Unrecognized filesystem" not in str(error) and isinstance(error, pa.ArrowInvalid):
            raise _unreachable(text, error) from error
    except OSError as error:
        raise _unreachable(text, error) from error
    try:
        import fsspec.core

        filesystem, path = fsspec.core.url_to_fs(text)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise _unreachable(text, error) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def open_input(location: str | Path) -> pa.NativeFile:
    """Open a file of any location for reading at any place.

    Raises:
        OSError: The file cannot be opened.
        DataError: No library knows the file system.
    """
    filesystem, path = resolve(location)
    return filesystem.open_input_file(path)


class Storage:
    """The files of one folder, by their names relative to it, such as ``"done/000000.json"``.

    A file is visible when it is complete. On a local disk it is written under a temporary name,
    brought to the disk and renamed. Other file systems show an object when it is closed.

    Picklable.

    Args:
        location: The folder, as for :func:`resolve`. It need not exist.
    """

    def __init__(self, location: str | Path) -> None:
        self.location = os.fspath(location)
        self.filesystem, self.path = resolve(location)
        self.path = self.path.rstrip("/")
        self.is_local = isinstance(self.filesystem, pafs.LocalFileSystem)

    def full_name(self, name: str) -> str:
        """The name of a file as the user would write it."""
        folder = self.path if self.is_local else self.location.rstrip("/")
        return f"{folder}/{name}" if name else folder

    def is_file(self) -> bool:
        """Whether there is a file in place of the folder.

        Raises:
            OutputError: The place cannot be read.
        """
        with self._output_errors(""):
            return self.filesystem.get_file_info(self.path).is_file

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The sizes of all files in a folder and below, by their names.

        Raises:
            OutputError: The folder cannot be listed.
        """
        root = f"{self.path}/{folder}".rstrip("/")
        selector = pafs.FileSelector(root, allow_not_found=True, recursive=True)
        with self._output_errors(folder):
            found = self.filesystem.get_file_info(selector)
        return {
            info.path[len(self.path) + 1 :]: info.size
            for info in found
            if info.type == pafs.FileType.File
        }

    def size(self, name: str) -> int:
        """The size of a file that is there.

        Raises:
            OutputError: The folder cannot be read.
        """
        with self._output_errors(name):
            return self.filesystem.get_file_info(f"{self.path}/{name}").size

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file.

        Raises:
            OutputError: The file cannot be read.
        """
        with self._output_errors(name):
            try:
                with self.open_input(name) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def open_input(self, name: str) -> pa.NativeFile:
        """Open a file for reading at any place."""
        return self.filesystem.open_input_file(f"{self.path}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Write a file, or replace it.

        Raises:
            OutputError: The file cannot be written.
        """
        with self.open_output(name) as file:
            file.write(content)

    def create(self, name: str, content: bytes) -> None:
        """Write a file unless there is one. Of several processes on a local disk one writes.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.is_local:
            with self._open_local(name, _link) as file:
                file.write(content)
        elif self.read(name) is None:
            self.write(name, content)

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[OutputFile]:
        """Open a file for writing. It is there after the block, unless the block raises.

        Raises:
            OutputError: The file cannot be written. Other errors of the block pass as they are.
        """
        opened = self._open_local(name, os.replace) if self.is_local else self._open_object(name)
        with opened as file:
            yield file

    def delete(self, name: str) -> None:
        """Delete a file, if it is there.

        Raises:
            OutputError: The file cannot be deleted.
        """
        with self._output_errors(name), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def delete_temporary_files(self) -> None:
        """Delete what killed processes left. Call it when nobody needs to write any more."""
        for name in self.sizes():
            if is_temporary(name):
                self.delete(name)

    @contextlib.contextmanager
    def _open_local(self, name: str, publish: Callable[[str, str], None]) -> Iterator[OutputFile]:
        target = f"{self.path}/{name}"
        folder = os.path.dirname(target)
        temporary = f"{folder}/{_TEMPORARY}{secrets.token_hex(8)}"
        with contextlib.ExitStack() as stack:
            with self._output_errors(name):
                os.makedirs(folder, exist_ok=True)
                stack.callback(_delete_if_there, temporary)
                file = stack.enter_context(open(temporary, "xb"))
            yield OutputFile(file, lambda: self._output_errors(name))
            with self._output_errors(name):
                file.flush()
                os.fsync(file.fileno())
                _publish(publish, temporary, target)
                _sync_folder(folder)

    @contextlib.contextmanager
    def _open_object(self, name: str) -> Iterator[OutputFile]:
        target = f"{self.path}/{name}"
        with self._output_errors(name):
            if self.filesystem.type_name not in _OBJECT_STORES:
                self.filesystem.create_dir(target.rpartition("/")[0], recursive=True)
            file = self.filesystem.open_output_stream(target)
        try:
            yield OutputFile(file, lambda: self._output_errors(name))
            with self._output_errors(name):
                file.close()
        except BaseException:
            # Closing shows what was written so far, so it goes.
            with contextlib.suppress(Exception):
                file.close()
            with contextlib.suppress(Exception):
                self.filesystem.delete_file(target)
            raise

    @contextlib.contextmanager
    def _output_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            text = " ".join(str(error).split())
            reason, remedy = _REASONS.get(error.errno or 0, (text, "remove the cause"))
            raise OutputError(
                f"output: expected a folder that can be read and written, got {reason} for "
                f"{self.full_name(name)}; finished tasks stay, so {remedy} and run the same "
                "command again"
            ) from error


class OutputFile(io.RawIOBase):
    """A file that is being written. An error of the file system says which file and what to do."""

    def __init__(
        self,
        file: IO[bytes] | pa.NativeFile,
        output_errors: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self._file = file
        self._output_errors = output_errors

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
        with self._output_errors():
            return self._file.write(content)


def is_temporary(name: str) -> bool:
    """Whether a file has a temporary name of :class:`Storage`."""
    return name.rpartition("/")[2].startswith(_TEMPORARY)


def _delete_if_there(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _publish(publish: Callable[[str, str], None], temporary: str, target: str) -> None:
    try:
        publish(temporary, target)
    except FileNotFoundError:
        # Another process finished the run and took the file for a left-over. It has seen the
        # complete target, whose bytes are the same whoever writes them.
        if not os.path.exists(target):
            raise


def _link(temporary: str, target: str) -> None:
    """Rename a file unless the new name exists."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # File systems without hard links.
        if not os.path.exists(target):
            os.replace(temporary, target)
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


def _unreachable(location: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(
        f"{location}: expected a path, or a URL that pyarrow or fsspec knows, got an error: "
        f"{reason}; check the URL, or install the package of its file system"
    )
