"""The folder of built libraries, ``<place>/<version>/<key>/``. A key stands for one content.

filelock is not used: it opens its file by a path, and not inside a folder that was checked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .places import TEMPORARY, check_executable
from .plan import Plan, UnavailableError
from .trust import Folder, RefusedError, closed_on_error

# Seconds to wait for the build of another process, which takes minutes at most.
PATIENCE = 900
_LOCK = "lock"
_LARGEST_FACTS = 1 << 20

_open_locks: set[int] = set()


def _close_locks() -> None:
    for descriptor in _open_locks:
        os.close(descriptor)
    _open_locks.clear()


# A forked process shares the open file. If it kept that file open, the lock would outlive the
# process that builds.
os.register_at_fork(after_in_child=_close_locks)


@dataclass(frozen=True)
class Library:
    """An intact library. Its descriptor is open, and what was checked is what it reads."""

    path: Path
    descriptor: int


@dataclass(frozen=True)
class Failure:
    """A build that failed: the reason, and what tells its log from that of any other build."""

    reason: str
    identity: tuple[int, ...]


class Cache:
    """The built libraries of this version of marginops in one place.

    Reading needs no lock, because the folder of a library appears only when it is complete. All
    methods raise `RefusedError` if another user may have made what they look at.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def find(self, plan: Plan) -> Library | None:
        """The library of a plan, open; None if it is missing or damaged."""
        return self._find(plan.key, plan.name)

    def _find(self, key: str, name: str) -> Library | None:
        folder = self.folder.folder(key)
        if folder is None:
            return None
        with folder:
            facts = folder.file(f"{name}.json")
            stored = None if facts is None else _content(facts)
            library = folder.file(f"{name}.so")
        if library is None:
            return None
        with closed_on_error(library):
            # Nobody has to read a file that is much larger than the library.
            if isinstance(stored, dict) and stored.get("size") == os.fstat(library).st_size:
                with open(library, "rb", closefd=False) as file:
                    if stored == _fingerprint(file.read()):
                        return Library(folder.path / f"{name}.so", library)
        os.close(library)
        return None

    def store(self, plan: Plan, build: Folder) -> Path:
        """Move the library of a build to its folder, under the lock. It replaces a damaged library.

        Args:
            plan: The plan of the library.
            build: What `build_folder` has made. It holds the library.
        """
        # The compiler gives others the right to write to the library if the umask allows it. They
        # cannot reach it, because the folder is private.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(f"{plan.name}.so", flags, dir_fd=build.descriptor), "rb") as file:
            content = file.read()
        facts = {"content": _fingerprint(content), "inputs": plan.inputs}
        with build.make_folder("finished", 0o755) as finished:
            finished.write(f"{plan.name}.so", content, 0o644)
            finished.write(f"{plan.name}.json", json.dumps(facts, indent=1).encode(), 0o644)
        if self.folder.facts(plan.key) is not None:
            self._move(plan.key, self.folder, "damaged", build)
        self._move("finished", build, plan.key, self.folder)
        with contextlib.suppress(OSError, RefusedError):
            self.folder.remove(_log(plan))
        return self.folder.path / plan.key / f"{plan.name}.so"

    @staticmethod
    def _move(name: str, folder: Folder, new_name: str, new_folder: Folder) -> None:
        here, there = folder.descriptor, new_folder.descriptor
        os.rename(name, new_name, src_dir_fd=here, dst_dir_fd=there)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process build at a time. The system frees the lock if its holder dies.

        Raises:
            UnavailableError: Another process held the lock for too long.
        """
        deadline = time.monotonic() + PATIENCE
        descriptor = self._take_lock()
        if descriptor is None:
            say("waiting for another process that builds the native kernels")
        while descriptor is None:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"another process has held {self.folder.path / _LOCK} for {PATIENCE} s; "
                    "end that process, or wait until it has ended"
                )
            time.sleep(0.1)
            descriptor = self._take_lock()
        try:
            yield
        finally:
            _open_locks.discard(descriptor)
            # Closing the file would not free the lock if a forked process still has it open.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _take_lock(self) -> int | None:
        flags = os.O_RDWR | os.O_CREAT
        descriptor = self.folder.file(_LOCK, flags)
        if descriptor is None:
            with contextlib.suppress(OSError):
                os.unlink(_LOCK, dir_fd=self.folder.descriptor)
            descriptor = self.folder.file(_LOCK, flags)
        if descriptor is None:
            raise RefusedError(
                f"{self.folder.path / _LOCK}: expected a file, got something else; delete it"
            )
        _open_locks.add(descriptor)
        taken = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have removed the file, and locked a new one.
            facts = self.folder.facts(_LOCK)
            taken = facts is not None and os.path.samestat(facts, os.fstat(descriptor))
        except BlockingIOError:
            pass
        except OSError as error:
            raise RefusedError(
                f"{self.folder.path}: expected a file system that can lock files, got one that "
                f"cannot ({error.strerror}); use a folder on another file system"
            ) from error
        finally:
            if not taken:
                _open_locks.discard(descriptor)
                os.close(descriptor)
        return descriptor if taken else None

    @contextlib.contextmanager
    def build_folder(self) -> Iterator[Folder]:
        """Make a private folder for a build, under the lock. Leftovers of others are removed."""
        for name in self.folder.names():
            if name.startswith(TEMPORARY):
                self._clear(name)
        name = f"{TEMPORARY}{secrets.token_hex(8)}"
        with self.folder.make_folder(name, 0o700) as build:
            try:
                yield build
            finally:
                self._clear(name)

    def _clear(self, name: str) -> None:
        with contextlib.suppress(OSError, RefusedError):
            self.folder.remove(name)

    def failure(self, plan: Plan) -> Failure | None:
        """The last build of this library, if it failed."""
        descriptor = self.folder.file(_log(plan))
        if descriptor is None:
            return None
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            reason = file.readline().decode(errors="replace").strip()
        return Failure(
            reason,
            (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns),
        )

    def store_failure(self, plan: Plan, reason: str, output: str) -> str:
        """Store the output of a build that failed, under the lock.

        Returns:
            The reason, with the path of the stored output.
        """
        told = f"{reason} (full output: {self.folder.path / _log(plan)})"
        first_line = " ".join(told.splitlines())
        try:
            self.folder.write(_log(plan), f"{first_line}\n{output}".encode(errors="replace"))
        except (OSError, RefusedError):
            return reason
        return told

    def libraries(self) -> dict[str, str]:
        """Each library of this version, with "usable" or why it is not."""
        found = {}
        for key in self.folder.names():
            try:
                folder = None if key.startswith(TEMPORARY) else self.folder.folder(key)
                names = []
                if folder is not None:
                    with folder:
                        names = [name for name in folder.names() if name.endswith(".so")]
                for name in names:
                    found[f"{key}/{name}"] = self._state(key, name.removesuffix(".so"))
            except (OSError, RefusedError) as error:
                found[key] = str(error)
        return found

    def _state(self, key: str, name: str) -> str:
        library = self._find(key, name)
        if library is None:
            return "damaged; the next process that needs it compiles it again"
        try:
            check_executable(library.descriptor, library.path)
        finally:
            os.close(library.descriptor)
        return "usable"


def say(text: str) -> None:
    """Tell the user on standard error what takes time."""
    show(f"marginops: {text}\n")


def show(text: str) -> None:
    """Write a text to standard error in one piece, because several processes may write at once."""
    # Standard error may be missing or closed. The build has to go on all the same.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _log(plan: Plan) -> str:
    return f"{plan.key}.log"


def _content(facts: int) -> object:
    with open(facts, "rb") as file:
        text = file.read(_LARGEST_FACTS)
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return stored.get("content") if isinstance(stored, dict) else None


def _fingerprint(content: bytes) -> dict[str, object]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
