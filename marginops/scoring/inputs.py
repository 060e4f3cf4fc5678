"""The Parquet files that a user names: by paths, folders, patterns and URLs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs

from .errors import DataError
from .storage import error_line, resolve, shown


@dataclass(frozen=True)
class InputFile:
    """A file and how to open it.

    Attributes:
        location: An absolute path or a URL.
        filesystem: Its file system.
        path: Its path there.
    """

    location: str
    filesystem: pafs.FileSystem
    path: str


def find_files(files: str | Path | Sequence[str | Path]) -> list[InputFile]:
    """The files behind the given names, in their order.

    A folder stands for all ``*.parquet`` files directly in it, a pattern with ``*``, ``?``, ``[``
    or ``**`` for the files and folders that match. Both are sorted by their names. Hidden files are
    left out.

    Raises:
        DataError: A name stands for no file, or a file comes twice.
    """
    names = [files] if isinstance(files, str | Path) else list(files)
    found: dict[tuple[str, str], InputFile] = {}
    for name in names:
        for file in _expand(os.fspath(name)):
            path = os.path.realpath(file.path) if _is_local(file.filesystem) else file.path
            identity = file.filesystem.type_name, path
            if identity in found:
                raise DataError(
                    f"files: expected each file once, got {shown(file.location)} twice; "
                    "remove one of them"
                )
            found[identity] = file
    if not found:
        raise DataError("files: expected at least one Parquet file, got none; name a file")
    return list(found.values())


def common_names(files: Sequence[InputFile]) -> list[str]:
    """The names relative to the folder that holds all files, which do not change when it moves."""
    paths = [file.path.split("/") for file in files]
    common = 0
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len({*parts}) > 1:
            break
        common += 1
    return ["/".join(path[common:]) for path in paths]


def _expand(name: str) -> Iterator[InputFile]:
    filesystem, path = resolve(name)
    if _is_local(filesystem):
        name = path
    try:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.File:
            yield InputFile(name, filesystem, path)
            return
        if kind == pafs.FileType.Directory:
            paths, folder, folder_path = _in_folder(filesystem, path), name, path
            expected = (
                "*.parquet files directly in this folder, got none; pass a pattern such as "
                '"FOLDER/**/*.parquet" for those in its folders'
            )
        elif _has_wildcard(path):
            paths, folder = _matches(filesystem, path), _folder_of_pattern(filesystem, name)
            folder_path = resolve(folder)[1]
            expected = "a pattern that matches files, got no match; check the path"
        else:
            paths = []
            expected = "a file, a folder or a pattern, got nothing there; check the path"
    except OSError as error:
        raise DataError(
            f"{shown(name)}: expected a file that can be read, got an error: "
            f"{error_line(error, name)}; check the path and its permissions"
        ) from error
    if not paths:
        raise DataError(f"{shown(name)}: expected {expected}")
    for found in paths:
        location = _location(filesystem, folder, folder_path, found)
        yield InputFile(location, filesystem, found)


def _in_folder(filesystem: pafs.FileSystem, path: str) -> list[str]:
    infos = filesystem.get_file_info(pafs.FileSelector(path))
    return _visible(info.path for info in infos if info.path.endswith(".parquet") and info.is_file)


def _matches(filesystem: pafs.FileSystem, pattern: str) -> list[str]:
    # fsspec knows patterns, and takes any file system of pyarrow.
    from fsspec.implementations.arrow import ArrowFSWrapper

    found = ArrowFSWrapper(filesystem).glob(pattern, detail=True)
    files: list[str] = []
    for path in _visible(found):
        if found[path]["type"] == "file":
            files.append(path)
        elif not pattern.endswith("**"):
            files += _in_folder(filesystem, path)
    return files


def _visible(paths: Iterable[str]) -> list[str]:
    return sorted(path for path in paths if not path.rpartition("/")[2].startswith("."))


def _has_wildcard(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _folder_of_pattern(filesystem: pafs.FileSystem, name: str) -> str:
    """The location of the folder before the first part with a wildcard."""
    name, options = _split_options(filesystem, name)
    parts = name.split("/")
    first = next(index for index, part in enumerate(parts) if _has_wildcard(part))
    return "/".join([*parts[:first], ""]) + options


def _location(filesystem: pafs.FileSystem, folder: str, folder_path: str, path: str) -> str:
    """The location of a path in a folder."""
    if _is_local(filesystem):
        return path
    folder, options = _split_options(filesystem, folder)
    rest = path[len(folder_path.rstrip("/")) + 1 :]
    # pyarrow decodes what a URI encodes.
    rest = rest if isinstance(filesystem, pafs.PyFileSystem) else quote(rest)
    return f"{folder}{'' if folder.endswith('/') else '/'}{rest}{options}"


def _split_options(filesystem: pafs.FileSystem, name: str) -> tuple[str, str]:
    """A location and the options behind it, which the URIs of pyarrow have."""
    if _is_local(filesystem) or isinstance(filesystem, pafs.PyFileSystem):
        return name, ""
    name, mark, options = name.partition("?")
    return name, mark + options


def _is_local(filesystem: pafs.FileSystem) -> bool:
    return isinstance(filesystem, pafs.LocalFileSystem)
