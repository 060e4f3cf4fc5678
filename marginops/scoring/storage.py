"""Files of a run, on the local disk or on any file system that pyarrow or fsspec knows."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from .errors import DataError
from .outputs import OutputFile, is_temporary, open_local, open_object, output_errors

_ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
# What stands before the host. In the second form, a key has a slash that should be encoded.
_KEYS = re.compile(r"^[^/]*@|^[^/@]*:(?!\d+/)[^@]*@")


def resolve(location: str | Path) -> tuple[pafs.FileSystem, str]:
    """The file system of a location and the path in it.

    Args:
        location: A local path; a URI that pyarrow knows, such as ``file://``, ``s3://`` or
            ``gs://``; or any other URL that fsspec knows, such as ``memory://`` or ``sftp://``.

    Raises:
        DataError: Neither pyarrow nor fsspec knows the file system, or it cannot be reached.
    """
    text = os.fspath(location)
    if "://" not in text:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        return pafs.FileSystem.from_uri(text)
    except pa.ArrowNotImplementedError:
        pass  # a pyarrow that was built without this file system
    except (OSError, pa.ArrowInvalid) as error:
        if text.partition("://")[0] in _ARROW_SCHEMES:
            raise _unreachable(text, error) from error
    try:
        import fsspec.core

        filesystem, path = fsspec.core.url_to_fs(text)
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise _unreachable(text, error) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def shown(location: str) -> str:
    """A location without the keys and options that a URL may hold."""
    scheme, mark, rest = location.rpartition("://")
    if not mark:
        return location
    return f"{scheme}{mark}{_KEYS.sub('', rest.partition('?')[0])}"


def error_line(error: Exception, location: str) -> str:
    """The text of an error in one line, without the keys of the location that it may name."""
    return " ".join(str(error).replace(location, shown(location)).split())


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

    def full_name(self, name: str = "") -> str:
        """The name of a file as the user would write it."""
        folder = self.path if self.is_local else shown(self.location).rstrip("/")
        return f"{folder}/{name}" if name else folder

    def is_file(self) -> bool:
        """Whether there is a file in place of the folder.

        Raises:
            OutputError: The place cannot be read.
        """
        with output_errors(self.full_name()):
            return self.filesystem.get_file_info(self.path).is_file

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The sizes of all files in a folder and below, by their names.

        Raises:
            OutputError: The folder cannot be listed.
        """
        root = f"{self.path}/{folder}".rstrip("/")
        selector = pafs.FileSelector(root, allow_not_found=True, recursive=True)
        with output_errors(self.full_name(folder)):
            if isinstance(self.filesystem, pafs.PyFileSystem):
                # fsspec remembers lists of files. Others may have written since.
                self.filesystem.handler.fs.invalidate_cache()
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
        with output_errors(self.full_name(name)):
            return self.filesystem.get_file_info(f"{self.path}/{name}").size

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file.

        Raises:
            OutputError: The file cannot be read.
        """
        with output_errors(self.full_name(name)):
            try:
                with self.open_input(name) as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def open_input(self, name: str) -> pa.NativeFile:
        """Open a file for reading at any place."""
        return self.filesystem.open_input_file(f"{self.path}/{name}")

    def write(self, name: str, content: bytes, durable: bool = True) -> None:
        """Write a file, or replace it.

        Args:
            name: The file.
            content: Its bytes.
            durable: Whether the bytes are on the disk when the file is there. Without it a machine
                that loses its power may leave a damaged file, which the reader must notice.

        Raises:
            OutputError: The file cannot be written.
        """
        with self.open_output(name, durable) as file:
            file.write(content)

    def create(self, name: str, content: bytes) -> None:
        """Write a file unless there is one. Of several processes on a local disk one writes.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.is_local:
            with open_local(f"{self.path}/{name}", self.full_name(name), replace=False) as file:
                file.write(content)
        elif self.read(name) is None:
            self.write(name, content)

    @contextlib.contextmanager
    def open_output(self, name: str, durable: bool = True) -> Iterator[OutputFile]:
        """Open a file for writing. It is there after the block, unless the block raises.

        Args:
            name: The file.
            durable: As for :meth:`write`.

        Raises:
            OutputError: The file cannot be written. Other errors of the block pass as they are.
        """
        target, full_name = f"{self.path}/{name}", self.full_name(name)
        if self.is_local:
            opened = open_local(target, full_name, durable=durable)
        else:
            opened = open_object(self.filesystem, target, full_name)
        with opened as file:
            yield file

    def delete(self, name: str) -> None:
        """Delete a file, if it is there.

        Raises:
            OutputError: The file cannot be deleted.
        """
        with output_errors(self.full_name(name)), contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{name}")

    def delete_temporary_files(self) -> None:
        """Delete what killed processes left. Call it when nobody needs to write any more."""
        for name in self.sizes():
            if is_temporary(name):
                self.delete(name)


def _unreachable(location: str, error: Exception) -> DataError:
    return DataError(
        f"{shown(location)}: expected a path, or a URL that pyarrow or fsspec knows, got an error: "
        f"{error_line(error, location)}; check the URL, or install the package of its file system"
    )
