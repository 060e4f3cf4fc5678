"""The folder of built libraries: ``<cache>/<version>/<key>/``, where a name means one content."""

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
    """``MARGINOPS_CACHE_DIR``, else ``marginops`` in the user's cache folder."""
    chosen = os.environ.get("MARGINOPS_CACHE_DIR")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home).absolute() / "marginops"


class Cache:
    """The libraries of this version. Reading needs no lock: a folder appears complete or not."""

    def __init__(self) -> None:
        self.folder = cache_folder() / __version__

    def find(self, plan: Plan) -> Path | None:
        """The library of a plan, if it is there and its content is what was stored."""
        library = self.folder / plan.key / f"{plan.name}.so"
        try:
            stored = json.loads(library.with_suffix(".json").read_text())
            content = library.read_bytes()
        except (OSError, ValueError):
            return None
        return library if stored.get("content") == _fingerprint(content) else None

    def store(self, plan: Plan, built: Path) -> Path:
        """Puts a built library in its place, under the lock; a damaged one makes room for it."""
        fresh = built.parent / "finished"
        fresh.mkdir()
        library = fresh / f"{plan.name}.so"
        shutil.copyfile(built, library)
        facts = {"content": _fingerprint(library.read_bytes()), "inputs": plan.inputs}
        library.with_suffix(".json").write_text(json.dumps(facts, indent=1))
        place = self.folder / plan.key
        if place.exists():
            os.replace(place, built.parent / "damaged")
        os.replace(fresh, place)
        return place / library.name

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time. The system frees the lock when its holder dies."""
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
                # A process forked meanwhile has the same open file: closing ours would not do.
                fcntl.flock(file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def build_folder(self) -> Iterator[Path]:
        """A private folder to build in, under the lock: what killed processes left is removed."""
        for left in self.folder.glob(f"{_BUILDING}*"):
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def failure_log(self, plan: Plan) -> Path:
        """Where the output of a failed build is kept; its first line is the reason."""
        return self.folder / f"{plan.key}.log"


def say(text: str) -> None:
    """Tells the user what takes so long."""
    show(f"marginops: {text}\n")


def show(text: str) -> None:
    """Writes to standard error in one piece, since several processes may speak at once."""
    # A process without a console has none, or a closed one; it needs its kernels all the same.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _fingerprint(content: bytes) -> dict[str, object]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
