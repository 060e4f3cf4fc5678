"""Where built libraries and downloaded data may be stored, and whether a place is fit for that.

platformdirs is not used: it names only one of these places, and it does not check it.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import pwd
import secrets
import stat
from pathlib import Path

from .._version import __version__
from .trust import Folder, RefusedError, closed_on_error

# The names of what only a running build needs begin with this.
TEMPORARY = "building-"
_DATA = "data"
ADVICE = (
    "set MARGINOPS_CACHE_DIR to a folder where only you may write, on a file system from which "
    "programs may run"
)


def candidates() -> list[Path]:
    """The folders that may be the cache, best first. ``MARGINOPS_CACHE_DIR`` leaves no choice.

    Raises:
        RefusedError: ``MARGINOPS_CACHE_DIR`` is not an absolute path.
    """
    home = _home()
    chosen = os.environ.get("MARGINOPS_CACHE_DIR")
    if chosen:
        first, _, rest = chosen.partition("/")
        path = home / rest if home and first == "~" else Path(os.path.expanduser(chosen))
        if not path.is_absolute():
            raise RefusedError(
                f"MARGINOPS_CACHE_DIR: expected an absolute path, got {chosen!r}; "
                "write the full path, which begins with /"
            )
        return [path]
    found = []
    # The specification of this variable asks that a relative path is ignored.
    if os.path.isabs(os.environ.get("XDG_CACHE_HOME", "")):
        found.append(Path(os.environ["XDG_CACHE_HOME"]) / "marginops")
    if home:
        found.append(home / ".cache/marginops")
    temporary = os.environ.get("TMPDIR", "")
    if not (os.path.isabs(temporary) and os.path.isdir(temporary)):
        temporary = "/tmp"
    return list(dict.fromkeys([*found, Path(temporary) / f"marginops-{os.geteuid()}"]))


def _home() -> Path | None:
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            return None
    return Path(home) if os.path.isabs(home) else None


def find(place: Path) -> Folder | None:
    """Open the folder of this version in a place; None if there is none.

    Raises:
        RefusedError: Others may have changed the folder.
        OSError: The folder cannot be read.
    """
    return _find_inside(place, __version__)


def make(place: Path) -> Folder:
    """Open the folder of this version in a place, where libraries can be stored and loaded.

    The function makes missing folders, and tries what a build will need.

    Raises:
        RefusedError: Others may have changed the folder, or no library can be loaded from there.
        OSError: Nothing can be written there.
    """
    with _make_place(place) as top:
        facts = top.facts(__version__)
        if facts is not None and not stat.S_ISDIR(facts.st_mode):
            top.remove(__version__)
        folder = _make_inside(top, __version__)
    with closed_on_error(folder.descriptor):
        probe = probe_file(folder.descriptor)
        try:
            check_executable(probe, folder.path)
        finally:
            os.close(probe)
    return folder


def find_data(place: Path, name: str) -> Folder | None:
    """Open the folder of a data set in a place; None if there is none.

    Raises:
        RefusedError: Others may have changed the folder.
        OSError: The folder cannot be read.
    """
    return _find_inside(place, _DATA, name)


def _find_inside(place: Path, *names: str) -> Folder | None:
    folder = Folder.at(place)
    for name in names:
        if folder is None:
            return None
        with folder:
            folder = folder.folder(name)
    return folder


def make_data(place: Path, name: str) -> Folder:
    """Open the folder of a data set in a place. The function makes missing folders.

    Every version of the package uses the same folder.

    Raises:
        RefusedError: Others may have changed the folder.
        OSError: The folder cannot be made.
    """
    with _make_place(place) as top, _make_inside(top, _DATA) as data:
        return _make_inside(data, name)


def _make_place(place: Path) -> Folder:
    paths = [place, *place.parents]
    missing = list(itertools.takewhile(lambda path: not os.path.lexists(path), paths))
    for path in reversed(missing):
        # Another process may make the same folder.
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755)
    top = Folder.at(place)
    if top is None:
        raise RefusedError(f"{place}: this folder was made and has gone")
    return top


def _make_inside(parent: Folder, name: str) -> Folder:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent.descriptor)
    folder = parent.folder(name)
    if folder is None:
        raise RefusedError(f"{parent.path / name}: this folder cannot be opened")
    return folder


def probe_file(folder: int) -> int:
    """Write a page to a new file of an open folder, remove its name, and return its descriptor.

    Permissions say nothing of a full disk, of a quota, of a file system that is mounted read-only,
    or of what root may do on a remote one.
    """
    name = f"{TEMPORARY}{secrets.token_hex(8)}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    probe = os.open(name, flags, 0o600, dir_fd=folder)
    with closed_on_error(probe):
        with contextlib.suppress(FileNotFoundError):  # a build that tidies up was faster
            os.unlink(name, dir_fd=folder)
        os.write(probe, bytes(mmap.PAGESIZE))
    return probe


def check_executable(file: int, path: Path) -> None:
    """Check that an open file can be mapped as code, as the loader of libraries maps it.

    Raises:
        RefusedError: The file system forbids it.
    """
    try:
        mmap.mmap(file, 1, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()
    except OSError as error:
        raise RefusedError(
            f"{path}: expected a file system from which programs may run, got one that cannot map "
            f"a segment of a library as code ({error.strerror}), for example because it is mounted "
            "noexec; use a folder on another file system"
        ) from error
