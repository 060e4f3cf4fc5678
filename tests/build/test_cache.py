"""What the cache stores: damage is found and replaced; a library that does not load is kept."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader, write_tiny
from marginops._native import cache, jit, places, plan


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
def library(place: Path) -> Path:
    (found,) = place.glob("*/*/*.so")
    return found


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
            (folder.path / library.name).write_bytes(content)
            the_cache.store(the_plan, folder)

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
