"""Opens files and folders of the cache that only this user or root can have changed.

Everything is opened once, without following a link, inside a folder that is open already. Then the
open file is checked. So nobody can exchange it between its check and its use, not even somebody who
may rename the folders above the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

# A pipe or a device in the place of a file must not make the process wait.
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# What opening fails with if a link, a folder, a socket or something unreadable has the name.
_OTHER_KIND = (errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.EACCES)


class RefusedError(Exception):
    """A file or folder of the cache cannot be used. The message says why and what to do."""


def user_name(number: int) -> str:
    """The name of a user, or the number of a user without a name."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def check(path: Path, facts: os.stat_result) -> None:
    """Check that only this user and root may change a file, folder or link.

    Raises:
        RefusedError: It belongs to another user, or others may write to it.
    """
    me = os.geteuid()
    if facts.st_uid not in (me, 0):
        allowed = " or ".join(dict.fromkeys([user_name(me), user_name(0)]))
        raise RefusedError(
            f"{path}: expected the owner {allowed}, got {user_name(facts.st_uid)}; "
            "use another folder"
        )
    mode = stat.S_IMODE(facts.st_mode)
    # The mode of a link has no meaning.
    if mode & 0o022 and not stat.S_ISLNK(facts.st_mode):
        shared_on_purpose = facts.st_uid != me or mode & stat.S_ISVTX
        remedy = f"run `chmod go-w {shlex.quote(str(path))}` if you trust its content"
        raise RefusedError(
            f"{path}: expected that only its owner may write to it, got mode {mode:04o}; "
            f"{'use another folder' if shared_on_purpose else remedy}"
        )


@contextlib.contextmanager
def closed_on_error(descriptor: int) -> Iterator[None]:
    """Close a descriptor if the block fails."""
    try:
        yield
    except BaseException:
        os.close(descriptor)
        raise


def path_of_open(descriptor: int, path: Path) -> Path:
    """A path of an open file or folder that others cannot turn, whatever happens to its folders.

    Without /proc it is the usual path, and then the folders above the cache have to be safe.
    """
    through_proc = Path(f"/proc/self/fd/{descriptor}")
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(through_proc), os.fstat(descriptor)):
            return through_proc
    return path


class Folder:
    """An open folder that only this user and root may change.

    A method that opens an entry returns None if the entry is missing or damaged. Damaged means that
    it is of another kind or unreadable. If another user may have made the entry, all methods raise
    `RefusedError`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        with closed_on_error(descriptor):
            check(path, os.fstat(descriptor))

    @classmethod
    def at(cls, path: Path) -> Folder | None:
        """Open the folder of a path; None if it is missing. A link of this user is followed."""
        try:
            facts = os.lstat(path)
        except FileNotFoundError:
            return None
        if stat.S_ISLNK(facts.st_mode):
            check(path, facts)
        return cls(path, os.open(path, _FOLDER))

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def names(self) -> list[str]:
        """The names of the entries."""
        return sorted(os.listdir(self.descriptor))

    def facts(self, name: str) -> os.stat_result | None:
        """Facts about an entry; None if it is missing. Links are not followed."""
        try:
            facts = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        check(self.path / name, facts)
        return facts

    def folder(self, name: str) -> Folder | None:
        """Open a folder inside this folder."""
        descriptor = self._open(name, _FOLDER | os.O_NOFOLLOW)
        return None if descriptor is None else Folder(self.path / name, descriptor)

    def file(self, name: str, flags: int = os.O_RDONLY) -> int | None:
        """Open a regular file, and return its descriptor. ``flags`` may ask to create it."""
        descriptor = self._open(name, flags | _FILE)
        if descriptor is None:
            return None
        with closed_on_error(descriptor):
            facts = os.fstat(descriptor)
            check(self.path / name, facts)
        if stat.S_ISREG(facts.st_mode):
            return descriptor
        os.close(descriptor)
        return None

    def _open(self, name: str, flags: int) -> int | None:
        try:
            return os.open(name, flags, 0o600, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _OTHER_KIND or self.facts(name) is None:
                raise
            return None

    def make_folder(self, name: str, mode: int) -> Folder:
        """Make a folder inside this folder. The umask may take permissions away."""
        os.mkdir(name, mode, dir_fd=self.descriptor)
        folder = self.folder(name)
        if folder is None:
            raise RefusedError(f"{self.path / name}: this folder was just made and has gone")
        return folder

    def write(self, name: str, content: bytes, mode: int = 0o600) -> None:
        """Write a new file, in the place of whatever has the name."""
        self.remove(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FILE
        with open(os.open(name, flags, mode, dir_fd=self.descriptor), "wb") as file:
            file.write(content)

    def remove(self, name: str) -> None:
        """Remove an entry of any kind, with everything inside it. Links are not followed."""
        if self.facts(name) is not None:
            _remove(name, self.descriptor)


def _remove(name: str, parent: int) -> None:
    try:
        return os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=parent)
    try:
        for entry in os.listdir(descriptor):
            _remove(entry, descriptor)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=parent)
