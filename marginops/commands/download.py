"""Downloads the files of a data set into the cache: each is complete and checked, or not there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import secrets
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .._native import places
from .._native.trust import Folder, RefusedError
from . import console
from .idx import DataError

# Seconds without a byte, and seconds for a whole file, after which a download is given up.
STALL = 30.0
LONGEST = 1800.0
_CHUNK = 1 << 16
_LOCK = "lock"
_TEMPORARY = "downloading-"


@dataclass(frozen=True)
class RemoteFile:
    """The name, the number of bytes and the SHA-256 of a file on a server."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where a data set can be downloaded.

    Attributes:
        name: The name of the data set, and of its folder in the cache.
        address: The address of the files. It ends with a slash.
        files: The files.
        otherwise: What a user can do where the download is not possible.
    """

    name: str
    address: str
    files: Sequence[RemoteFile]
    otherwise: str


def fetch(source: Source, *, quiet: bool) -> Path:
    """Return the folder of the cache that holds a data set. Missing files are downloaded first.

    Every file is checked by its size and SHA-256, also one that is there already. A file that fails
    the check is downloaded again.

    Args:
        source: The data set.
        quiet: Show no progress. It is shown on a terminal only.

    Raises:
        DataError: A file cannot be downloaded or stored.
    """
    try:
        candidates = places.candidates()
    except RefusedError as error:
        raise DataError(f"{source.name}: {error}") from error
    refused: dict[Path, str] = {}
    for step in (_find, _download):
        for place in candidates:
            if place in refused:
                continue
            try:
                found = step(place, source, quiet)
            except (RefusedError, OSError) as error:
                refused[place] = f"the cache folder {place} cannot be used ({error})"
                continue
            if found is not None:
                return found
    reasons = "; ".join(refused.values())
    raise DataError(
        f"{source.name}: expected a folder for the downloaded files, got none: {reasons}; set "
        f"MARGINOPS_CACHE_DIR to a folder where only you may write, or {source.otherwise}"
    )


def _find(place: Path, source: Source, quiet: bool) -> Path | None:
    folder = places.find_data(place, source.name)
    if folder is None:
        return None
    with folder:
        return None if _missing(folder, source) else folder.path


def _download(place: Path, source: Source, quiet: bool) -> Path:
    with places.make_data(place, source.name) as folder, _locked(folder, quiet):
        for name in folder.names():
            if name.startswith(_TEMPORARY):
                folder.remove(name)
        # Another run may have downloaded them while this one waited.
        missing = _missing(folder, source)
        if missing:
            from tqdm import tqdm

            with tqdm(
                desc=f"downloading {source.name}",
                total=sum(file.size for file in missing),
                unit="B",
                unit_scale=True,
                disable=quiet or None,
                dynamic_ncols=True,
            ) as progress:
                for file in missing:
                    _store(folder, file, source, progress.update)
        return folder.path


def _missing(folder: Folder, source: Source) -> list[RemoteFile]:
    return [file for file in source.files if not _is_complete(folder, file)]


def _is_complete(folder: Folder, file: RemoteFile) -> bool:
    descriptor = folder.file(file.name)
    if descriptor is None:
        return False
    with open(descriptor, "rb") as stored:
        if os.fstat(descriptor).st_size != file.size:
            return False
        return hashlib.sha256(stored.read()).hexdigest() == file.sha256


@contextlib.contextmanager
def _locked(folder: Folder, quiet: bool) -> Iterator[None]:
    """Let one run download at a time. The system frees the lock if its holder dies."""
    descriptor = folder.file(_LOCK, os.O_RDWR | os.O_CREAT)
    if descriptor is None:
        raise RefusedError(f"{folder.path / _LOCK}: expected a file, got something else; delete it")
    # Closing the file frees the lock.
    with open(descriptor, "rb"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not quiet:
                console.fail(f"marginops: another run fills {folder.path}; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _store(
    folder: Folder, file: RemoteFile, source: Source, on_bytes: Callable[[int], object]
) -> None:
    """Download a file under a temporary name, check it, and give it its name."""
    name = f"{_TEMPORARY}{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(name, flags, 0o644, dir_fd=folder.descriptor), "wb") as stored:
            size, digest = 0, hashlib.sha256()
            for part in _receive(file, source):
                stored.write(part)
                digest.update(part)
                size += len(part)
                on_bytes(len(part))
        if size != file.size:
            amount = "more" if size > file.size else f"{size:,}"
            raise _failure(file, source, f"{file.size:,} bytes", amount)
        if digest.hexdigest() != file.sha256:
            raise _failure(file, source, f"the SHA-256 {file.sha256}", digest.hexdigest())
        folder.remove(file.name)
        here = folder.descriptor
        os.rename(name, file.name, src_dir_fd=here, dst_dir_fd=here)
    except BaseException:
        with contextlib.suppress(OSError, RefusedError):
            folder.remove(name)
        raise


def _receive(file: RemoteFile, source: Source) -> Iterator[bytes]:
    """Yield the content that a server sends: hardly more than expected, and not for ever."""
    deadline = time.monotonic() + LONGEST
    received = 0
    try:
        with urllib.request.urlopen(source.address + file.name, timeout=STALL) as response:
            while received <= file.size and (part := response.read1(_CHUNK)):
                received += len(part)
                yield part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not complete after {LONGEST:g} s")
    except urllib.error.HTTPError as error:
        got = f"HTTP status {error.code} ({error.reason})"
        raise _failure(file, source, "the file", got) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError) and str(reason) == "timed out":
            reason = f"nothing for {STALL:g} s"
        raise _failure(file, source, "an answer", f"{reason or type(error).__name__}") from error


def _failure(file: RemoteFile, source: Source, expected: str, got: str) -> DataError:
    # What a server sends may be long and may have several lines.
    got = textwrap.shorten(got, 200)
    return DataError(
        f"{source.address}{file.name}: expected {expected}, got {got}; {source.otherwise}"
    )
