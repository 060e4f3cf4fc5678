"""The folder of built libraries, ``<cache>/<version>/<key>/``. A key stands for one content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .._version import __version__
from .plan import Plan

_BUILDING = "building-"


def cache_folder() -> Path:
    """``MARGINOPS_CACHE_DIR`` if it is set, else ``marginops`` in the user's cache folder."""
    chosen = os.environ.get("MARGINOPS_CACHE_DIR")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home).absolute() / "marginops"


class Cache:
    """The built libraries of this version of marginops.

    Reading needs no lock, because the folder of a library appears only when it is complete.
    """

    def __init__(self) -> None:
        self.folder = cache_folder() / __version__

    def find(self, plan: Plan) -> Path | None:
        """The library of a plan; None if it is missing or if its content has changed."""
        library = self.folder / plan.key / f"{plan.name}.so"
        try:
            stored = json.loads(library.with_suffix(".json").read_text())
            content = library.read_bytes()
        except (OSError, ValueError):
            return None
        return library if stored.get("content") == _fingerprint(content) else None

    def store(self, plan: Plan, built: Path) -> Path:
        """Move a built library to its folder, under the lock. It replaces a damaged library."""
        finished = built.parent / "finished"
        finished.mkdir()
        library = finished / f"{plan.name}.so"
        shutil.copyfile(built, library)
        facts = {"content": _fingerprint(library.read_bytes()), "inputs": plan.inputs}
        library.with_suffix(".json").write_text(json.dumps(facts, indent=1))
        folder = self.folder / plan.key
        if folder.exists():
            os.replace(folder, built.parent / "damaged")
        os.replace(finished, folder)
        return folder / library.name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Let one process build at a time. The system frees the lock if its holder dies."""
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another process that builds the native kernels")
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # A process forked in the meantime shares the open file, so closing the file here
                # would not free the lock.
                fcntl.flock(file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def build_folder(self) -> Iterator[Path]:
        """Make a temporary folder for a build, under the lock. Leftovers of others are removed."""
        for leftover in self.folder.glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def failure_log(self, plan: Plan) -> Path:
        """The file for the output of a failed build. Its first line is the reason."""
        return self.folder / f"{plan.key}.log"


def say(text: str) -> None:
    """Tell the user on standard error what takes time."""
    show(f"marginops: {text}\n")


def show(text: str) -> None:
    """Write a text to standard error in one piece, because several processes may write at once."""
    # Standard error may be missing or closed. The build has to go on all the same.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _fingerprint(content: bytes) -> dict[str, object]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
