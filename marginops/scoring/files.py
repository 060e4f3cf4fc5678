"""The Parquet files that a user names: by paths, folders, patterns and URLs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pyarrow.fs as pafs

from .errors import DataError
from .storage import resolve


def find_files(files: str | Path | Sequence[str | Path]) -> list[str]:
    """The files behind the given names, in their order; local ones as absolute paths.

    A folder stands for all ``*.parquet`` files directly in it, a pattern with ``*``, ``?``, ``[``
    or ``**`` for the files and folders that match. Both are sorted by their names. Hidden files are
    left out.

    Raises:
        DataError: A name stands for no file, or a file comes twice.
    """
    names = [files] if isinstance(files, str | Path) else list(files)
    found: dict[tuple[str, str], str] = {}
    for name in names:
        for path, location in _expand(os.fspath(name)):
            if path in found:
                raise DataError(
                    f"files: expected each file once, got {location} twice; remove one of them"
                )
            found[path] = location
    if not found:
        raise DataError("files: expected at least one Parquet file, got none; name a file")
    return list(found.values())


def common_names(locations: Sequence[str]) -> list[str]:
    """The names relative to the folder that holds all files, which do not change when it moves."""
    paths = [location.partition("?")[0] for location in locations]
    folders = [path.rpartition("/")[0].split("/") for path in paths]
    common = 0
    for parts in zip(*folders, strict=False):
        if len({*parts}) > 1:
            break
        common += 1
    return ["/".join(path.split("/")[common:]) for path in paths]


def _expand(name: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield for each file what it is known by and its location."""
    filesystem, path = resolve(name)
    kind = filesystem.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        paths = _in_folder(filesystem, path)
        if not paths:
            raise DataError(
                f"{name}: expected a folder with *.parquet files, got none; pass "
                f'"{name.rstrip("/")}/**/*.parquet" for the files in its folders'
            )
        folder, folder_path = name, path
    elif kind == pafs.FileType.NotFound and _has_wildcard(path):
        paths = list(_matches(filesystem, path))
        if not paths:
            raise DataError(f"{name}: expected a pattern that matches files, got no match")
        folder = _without_wildcard(name)
        folder_path = resolve(folder)[1]
    elif kind == pafs.FileType.NotFound:
        raise DataError(f"{name}: expected a file or a folder, got nothing there; check the path")
    else:
        yield _identity(filesystem, path), path if _is_local(filesystem) else name
        return
    for found in paths:
        yield _identity(filesystem, found), _location(filesystem, folder, folder_path, found)


def _in_folder(filesystem: pafs.FileSystem, path: str) -> list[str]:
    infos = filesystem.get_file_info(pafs.FileSelector(path))
    return _visible(info.path for info in infos if info.path.endswith(".parquet") and info.is_file)


def _matches(filesystem: pafs.FileSystem, pattern: str) -> Iterator[str]:
    # fsspec knows patterns, and takes any file system of pyarrow.
    from fsspec.implementations.arrow import ArrowFSWrapper

    found = ArrowFSWrapper(filesystem).glob(pattern, detail=True)
    for path in _visible(found):
        if found[path]["type"] == "directory":
            if not pattern.endswith("**"):
                yield from _in_folder(filesystem, path)
        else:
            yield path


def _visible(paths: Iterable[str]) -> list[str]:
    return sorted(path for path in paths if not path.rpartition("/")[2].startswith("."))


def _has_wildcard(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _without_wildcard(name: str) -> str:
    """The folder before the first part with a wildcard. A URI keeps its options."""
    name, _, options = name.partition("?") if "://" in name else (name, "", "")
    parts = name.split("/")
    first = next(index for index, part in enumerate(parts) if _has_wildcard(part))
    folder = "/".join(parts[:first]) or ("/" if first else ".")
    return f"{folder}?{options}" if options else folder


def _location(filesystem: pafs.FileSystem, folder: str, folder_path: str, path: str) -> str:
    """The text by which ``resolve`` finds a path in a folder."""
    if _is_local(filesystem):
        return path
    rest = path[len(folder_path.rstrip("/")) + 1 :]
    if isinstance(filesystem, pafs.PyFileSystem):
        return f"{folder.rstrip('/')}/{rest}"
    # pyarrow decodes URIs.
    folder, _, options = folder.partition("?")
    return f"{folder.rstrip('/')}/{quote(rest)}{'?' if options else ''}{options}"


def _identity(filesystem: pafs.FileSystem, path: str) -> tuple[str, str]:
    return filesystem.type_name, os.path.realpath(path) if _is_local(filesystem) else path


def _is_local(filesystem: pafs.FileSystem) -> bool:
    return isinstance(filesystem, pafs.LocalFileSystem)
