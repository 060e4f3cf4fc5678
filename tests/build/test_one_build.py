"""One process builds at a time: the lock, and builds that fail."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader
from helpers.processes import PATIENCE, python, wait_until
from marginops import __version__
from marginops._native import cache, places

LOAD = """
import sys, warnings
from pathlib import Path
from marginops._native.loader import Loader
warnings.simplefilter("ignore")
loader = Loader(Path(sys.argv[1]), Path(sys.argv[1]))
loader.load("cpu")
print(loader.outcome("cpu").implementation, loader.outcome("cpu").reasons)
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for the cache, where the folder of this version is empty."""
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "cache"))
    for variable in ("MARGINOPS_DISABLE_JIT", "MARGINOPS_VERBOSE", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "cache" / __version__).mkdir(parents=True)
    (tmp_path / "cache" / __version__ / "lock").touch()
    return tmp_path / "cache"


@pytest.fixture
def lock(place: Path) -> Path:
    return place / __version__ / "lock"


def test_lock_is_no_link(place: Path, lock: Path, tiny: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.unlink()
    lock.symlink_to(victim)
    with places.make(place) as folder, cache.Cache(folder).lock():
        assert not lock.is_symlink()
    assert victim.read_text() == "precious"

    # A folder is refused: nobody knows who needs what is in it.
    lock.unlink()
    lock.mkdir()
    expect_reference(new_loader(tiny), "lock: expected a file, got something else; delete it")


def test_failed_build_is_tried_again(place: Path, tiny: Path, tmp_path: Path) -> None:
    broken, calls = tmp_path / "broken", tmp_path / "calls"
    broken.touch()
    compiler = write_compiler(tmp_path, f"[ -e {broken} ] && {{ echo error: broken; exit 1; }}")
    assert python(LOAD, tiny, CXX=compiler).communicate(timeout=PATIENCE)[0].startswith("reference")
    (log,) = place.glob("*/*.log")
    future = time.time() + 3600
    os.utime(log, (future, future))
    broken.unlink()
    assert python(LOAD, tiny, CXX=compiler).communicate(timeout=PATIENCE)[0].startswith("built now")
    assert not log.exists()
    assert calls.exists()


def write_compiler(folder: Path, before: str) -> str:
    """Writes a compiler that counts its calls, and first runs a line of shell."""
    compiler = folder / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-c*) ;; *) exec c++ "$@";; esac\n'
        f'echo call >>{folder}/calls\n{before}\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_process_that_waited_for_a_failed_build_does_not_repeat_it(
    tiny: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    compiler = write_compiler(tmp_path, f"cat {tmp_path}/go; echo error: broken; exit 1")
    first = python(LOAD, tiny, CXX=compiler)
    wait_until(lambda: (tmp_path / "calls").exists() or first.poll() is not None)
    second = python(LOAD, tiny, CXX=compiler)
    said = second.stderr.readline()
    assert "waiting for another process" in said
    calls = (tmp_path / "calls").read_text()
    while first.poll() is None:  # one writer for each compiler
        try:
            os.close(os.open(tmp_path / "go", os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO
        time.sleep(0.05)
    for process in (first, second):
        output, errors = process.communicate(timeout=PATIENCE)
        assert "the build failed: error: broken" in output, errors
        assert "compiling" not in errors or process is first
    assert len((tmp_path / "calls").read_text()) - len(calls) <= len("call\n")


def test_lock_is_waited_for_with_a_limit(
    lock: Path,
    tiny: Path,
    no_build: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    began = time.monotonic()
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        expect_reference(new_loader(tiny), "another process has held .*/lock for 0.3 s; end that")
    assert time.monotonic() - began < 60
    assert "waiting for another process that builds" in capfd.readouterr().err


def test_file_system_without_locks(
    tiny: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    expect_reference(
        new_loader(tiny), r"that can lock files, got .*\(No locks available\).*MARGINOPS_CACHE_DIR"
    )


def test_forked_process_does_not_keep_the_lock(place: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from marginops._native import cache, places
with places.make(Path(sys.argv[1])) as folder, cache.Cache(folder).lock():
    child = os.fork()
    if child == 0:
        os.close(1), os.close(2)
        time.sleep(600)
    print(child, flush=True)
    time.sleep(600)
"""
    parent = python(code, place)
    child = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.communicate(timeout=PATIENCE)
        os.kill(child, 0)
        with places.make(place) as folder:
            wait_until(lambda: free(cache.Cache(folder)))
    finally:
        os.kill(child, signal.SIGKILL)


def free(the_cache: cache.Cache) -> bool:
    descriptor = the_cache._take_lock()
    if descriptor is not None:
        os.close(descriptor)
        cache._open_locks.discard(descriptor)
    return descriptor is not None


def test_removed_lock_is_not_taken_for_the_lock(
    place: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def flock_of_a_removed_file(descriptor: int, operation: int) -> None:
        lock.unlink()
        flock(descriptor, operation)

    with places.make(place) as folder:
        the_cache = cache.Cache(folder)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", flock_of_a_removed_file)
            assert not free(the_cache)
        with the_cache.lock():
            assert not free(the_cache)
        assert free(the_cache)
