"""What the cache stores: damage, failures, the lock, and libraries that do not load."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

import marginops
from helpers.native_sources import expect_reference, new_loader, write_tiny
from marginops._native import cache, jit, places, plan

INSTALLED = Path(marginops.__file__).resolve().parents[1]
# Seconds to wait for what takes a few. Only a failing test waits so long.
PATIENCE = 300
LOAD = """
import sys, warnings
from pathlib import Path
from marginops._native.loader import Loader
warnings.simplefilter("ignore")
loader = Loader(Path(sys.argv[1]), Path(sys.argv[1]))
loader.load("cpu")
print(loader.outcome("cpu").implementation, loader.outcome("cpu").reasons)
"""


def python(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(INSTALLED), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the library of the tiny sources."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARGINOPS_CACHE_DIR", str(folder / "cache"))
        for variable in ("MARGINOPS_DISABLE_JIT", "CXX"):
            patch.delenv(variable, raising=False)
        assert new_loader(write_tiny(folder / "csrc")).load("cpu")
    return folder / "cache"


@pytest.fixture(autouse=True)
def place(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, which is the cache of this test."""
    shutil.copytree(built, tmp_path / "cache")
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "cache"))
    for variable in ("MARGINOPS_DISABLE_JIT", "MARGINOPS_VERBOSE", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "csrc")


@pytest.fixture
def library(place: Path) -> Path:
    (found,) = place.glob("*/*/*.so")
    return found


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("the library is built"))


def intact(place: Path, csrc: Path) -> bool:
    folder = places.find(place)
    assert folder is not None
    with folder:
        found = cache.Cache(folder).find(plan.make_plan("cpu", csrc))
    if found is not None:
        os.close(found.descriptor)
    return found is not None


def damages(library: Path) -> dict[str, Callable[[], object]]:
    """What may lie in the place of a library, of its facts, or of their folder."""
    facts, folder = library.with_suffix(".json"), library.parent
    content, described = library.read_bytes(), json.loads(facts.read_text())
    texts = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"[" * 100_000,
        b'{"content": null}',
        b"\xff",
    ]
    resized = described | {"content": described["content"] | {"size": len(content) + 1}}
    texts += [json.dumps(resized).encode(), b"1" * 10_000, os.urandom(100)]
    found = {f"facts {text[:12]!r}": (lambda text=text: replace(facts, text)) for text in texts}
    for part in (content[: len(content) // 2], b"", content[:-1] + b"?"):
        found[f"library of {len(part)} bytes"] = lambda part=part: replace(library, part)
    for path in (facts, library, folder):
        for name, make in {
            "missing": lambda path: None,
            "file": lambda path: path.write_text("x"),
            "folder": lambda path: (path / "inside").mkdir(parents=True),
            "dangling link": lambda path: path.symlink_to("nowhere"),
            "link": lambda path: path.symlink_to(path.parent.parent),
            "link to itself": lambda path: path.symlink_to(path.name),
            "pipe": os.mkfifo,
            "socket": make_socket,
        }.items():
            found[f"{path.name}: {name}"] = lambda path=path, make=make: (discard(path), make(path))
    return found


def make_socket(path: Path) -> None:
    # The path of a socket must be short.
    here = os.open(".", os.O_RDONLY)
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)
        os.close(here)


def replace(file: Path, content: bytes) -> None:
    """Replaces the file: writing into a loaded library would crash this process."""
    discard(file)
    file.write_bytes(content)


def discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def test_damage_is_found(built: Path, place: Path, library: Path, tiny: Path) -> None:
    assert intact(place, tiny)
    for name, damage in damages(library).items():
        damage()
        assert not intact(place, tiny), name
        discard(place)
        shutil.copytree(built, place)
    assert intact(place, tiny)


@pytest.mark.parametrize("name", ["_cpu", "[[", "dangling link", "pipe", "folder"])
def test_damage_is_replaced(
    place: Path, library: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = library.read_bytes()

    def build(the_plan: plan.Plan, the_cache: cache.Cache) -> None:
        with the_cache.build_folder() as folder:
            (folder / library.name).write_bytes(content)
            the_cache.store(the_plan, folder / library.name)

    monkeypatch.setattr(jit, "build", build)
    chosen = {each: make for each, make in damages(library).items() if name in each}
    assert chosen
    for each, damage in chosen.items():
        damage()
        found = new_loader(tiny)
        assert found.load("cpu"), (each, found.outcome("cpu").reasons)
        assert found.outcome("cpu").implementation == "built now", each
        assert intact(place, tiny), each
        assert not list(place.glob("*/building-*"))


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_log_in_the_place_of_something_else(
    place: Path, library: Path, tiny: Path, tmp_path: Path, kind: str
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    write_tiny(tiny, kernel="#error this cannot compile")
    log = library.parent.with_name(f"{plan.make_plan('cpu', tiny).key}.log")
    log.symlink_to(victim) if kind == "link" else (log / "inside").mkdir(parents=True)
    expect_reference(new_loader(tiny), "this cannot compile.*full output")
    assert "this cannot compile" in log.read_text()
    assert not log.is_symlink()
    assert victim.read_text() == "precious"


def test_lock_is_no_link(place: Path, library: Path, tiny: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = library.parents[1] / "lock"
    lock.unlink()
    lock.symlink_to(victim)
    with places.make(place) as folder, cache.Cache(folder).lock():
        assert not lock.is_symlink()
    assert victim.read_text() == "precious"

    # A folder is refused: nobody knows who needs what is in it.
    lock.unlink()
    lock.mkdir()
    discard(library.parent)
    expect_reference(new_loader(tiny), "lock: expected a file, got something else; delete it")


def test_library_that_does_not_load_is_not_built_again(
    library: Path, tiny: Path, no_build: None
) -> None:
    replace(library, b"no library")
    facts = {"size": 10, "sha256": sha256(b"no library").hexdigest()}
    library.with_suffix(".json").write_text(json.dumps({"content": facts}))
    reason = f"{library} is intact and does not load: {library}: .*; .*delete {library.parent}"
    for _ in range(2):
        expect_reference(new_loader(tiny), reason)


def test_library_loads_without_proc(
    library: Path, tiny: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    found = new_loader(tiny)
    assert found.load("cpu")
    assert found.outcome("cpu").library == library


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


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_lock_is_waited_for_with_a_limit(
    library: Path,
    tiny: Path,
    no_build: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    discard(library.parent)
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    with open(library.parents[1] / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        expect_reference(new_loader(tiny), "another process has held .*/lock for 0.3 s; end that")
    assert "waiting for another process that builds" in capfd.readouterr().err


def test_file_system_without_locks(
    library: Path, tiny: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    discard(library.parent)
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


def test_removed_lock_is_not_taken_for_the_lock(place: Path, library: Path) -> None:
    with places.make(place) as folder:
        the_cache = cache.Cache(folder)
        with the_cache.lock():
            assert not free(the_cache)
            # Another process removes the file, and locks a new one.
            (library.parents[1] / "lock").unlink()
            with the_cache.lock():
                assert not free(the_cache)
