"""What another user may have changed is refused, and what was checked is what is loaded."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader, only_library, write_tiny
from helpers.processes import INSTALLED, PATIENCE
from marginops import __version__
from marginops._native.loader import Outcome

NOBODY = 65534
# The process imports everything, and then becomes another user, who may be unable to reach Python.
# So it does not compile, but takes a library that is built already.
LOAD = """
import json, os, sys, warnings
from pathlib import Path
import torch, torch.utils.cpp_extension, pybind11, ninja
from marginops._native import jit
from marginops._native.loader import Loader
from marginops.commands import doctor
warnings.simplefilter("ignore")
csrc, user, task = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
(library,) = csrc.parent.glob("cache/*/*/*.so")
content = library.read_bytes()

def build(plan, cache):
    with cache.build_folder() as folder:
        (folder.path / library.name).write_bytes(content)
        cache.store(plan, folder)

jit.build = build
if user != os.geteuid():
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
loader = Loader(csrc, csrc)
if task == "doctor":
    print(json.dumps(doctor.report(loader, build=False)["cache"]))
else:
    loader.load("cpu")
    outcome = loader.outcome("cpu")
    print(json.dumps([outcome.implementation, outcome.reasons, str(outcome.library)]))
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def load(csrc: Path, task: str = "load", user: int = os.geteuid(), **variables: str | None):
    path = os.pathsep.join([INSTALLED, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(csrc), str(user), task],
        env={name: value for name, value in environment.items() if value is not None},
        cwd=csrc,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PARTS: dict[str, Callable[[Path], Path]] = {
    "place": lambda library: library.parents[2],
    "version": lambda library: library.parents[1],
    "key": lambda library: library.parent,
    "library": lambda library: library,
    "facts": lambda library: library.with_suffix(".json"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("more", [0o020, 0o002, 0o1022])
def test_what_others_may_write_is_refused(
    folder: Path, no_build: None, part: str, more: int
) -> None:
    path = PARTS[part](only_library(folder))
    path.chmod(path.stat().st_mode | more)
    remedy = "use another folder" if more & stat.S_ISVTX else "run `chmod go-w "
    reason = f"{path}: expected that only its owner may write to it, got mode .*{remedy}"
    expect_reference(new_loader(folder / "csrc"), f"{reason}.*MARGINOPS_CACHE_DIR")
    path.chmod(path.stat().st_mode & ~0o1022)
    assert new_loader(folder / "csrc").load("cpu")


@needs_root
@pytest.mark.parametrize("part", [*PARTS, "lock", "log"])
@pytest.mark.parametrize("kind", ["itself", "link"])
def test_what_another_user_made_is_refused(
    folder: Path, no_build: None, part: str, kind: str
) -> None:
    library = only_library(folder)
    paths = {name: path(library) for name, path in PARTS.items()}
    paths["lock"] = library.parents[1] / "lock"
    paths["log"] = library.parent.with_suffix(".log")
    path = paths[part]
    if part == "log":
        path.write_text("reason")
    if part in ("lock", "log"):
        library.with_suffix(".json").write_text("damaged")
    if kind == "link":
        path.rename(folder / "moved")
        path.symlink_to(folder / "moved")
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    name = pwd.getpwuid(NOBODY).pw_name
    expect_reference(
        new_loader(folder / "csrc"), f"{path}: expected the owner root, got {name}; use another"
    )


@needs_root
def test_cache_of_root_is_read_by_others(folder: Path) -> None:
    implementation, _, library = load(folder / "csrc", user=NOBODY)
    assert (implementation, library) == ("cached", str(only_library(folder)))
    report = load(folder / "csrc", "doctor", user=NOBODY)
    assert report["usable"] is True
    assert report["writable"] is False
    assert report["owner"] == "root"
    assert list(report["libraries"].values()) == ["usable"]

    (folder / "cache").chmod(0o700)
    implementation, reasons, _ = load(folder / "csrc", user=NOBODY)
    assert implementation == "reference"
    assert "MARGINOPS_CACHE_DIR" in reasons[-1]
    assert "Permission denied" in reasons[-1]
    report = load(folder / "csrc", "doctor", user=NOBODY)
    assert (report["folder"], report["usable"]) == (str(folder / "cache"), False)
    assert "Permission denied" in report["obstacles"][0]


@needs_root
def test_default_place_that_cannot_be_written_gives_way_to_a_private_one(folder: Path) -> None:
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    variables = {"MARGINOPS_CACHE_DIR": None, "TMPDIR": str(folder / "tmp")}
    private = folder / f"tmp/marginops-{NOBODY}"
    home = variables | {"HOME": str(folder)}
    implementation, reasons, library = load(folder / "csrc", user=NOBODY, **home)
    assert implementation == "built now"
    assert f"{folder}/.cache/marginops cannot be used: [Errno 13]" in reasons[-1]
    assert Path(library).is_relative_to(private)
    assert stat.S_IMODE(private.stat().st_mode) & 0o022 == 0
    assert load(folder / "csrc", user=NOBODY, **home)[0] == "cached"
    report = load(folder / "csrc", "doctor", user=NOBODY, **home)
    assert report["folder"] == str(private)
    assert "Permission denied" in report["other places"][0]

    # A home that is no folder, and one in which only root may write.
    for other in ("/dev/null", "/"):
        found = load(folder / "csrc", user=NOBODY, **variables | {"HOME": other})
        assert (found[0], found[2]) == ("cached", library)

    # Another user has taken the name of the private folder of a user without a home.
    (folder / "tmp/marginops-4242").mkdir()
    os.chown(folder / "tmp/marginops-4242", NOBODY, NOBODY)
    implementation, reasons, _ = load(folder / "csrc", user=4242, HOME=None, **variables)
    assert implementation == "reference"
    assert "marginops-4242: expected the owner user 4242 or root, got nobody" in reasons[-1]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_modes_follow_the_umask_and_never_let_others_write(folder: Path, umask: int) -> None:
    shutil.rmtree(folder / "cache")
    before = os.umask(umask)
    try:
        assert new_loader(folder / "csrc").load("cpu")
        write_tiny(folder / "broken", kernel="#error this cannot compile")
        expect_reference(new_loader(folder / "broken"), "this cannot compile")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (folder / "cache").rglob("*")}
    assert not any(mode & 0o022 for mode in modes.values())
    for path in PARTS.values():
        found = path(only_library(folder))
        assert stat.S_IMODE(found.stat().st_mode) == (0o755 if found.is_dir() else 0o644) & ~umask
    assert {mode for path, mode in modes.items() if path.suffix == ".log"} == {0o600}
    assert modes[folder / "cache" / __version__ / "lock"] == 0o600


def test_library_that_was_checked_is_the_one_that_is_loaded(
    folder: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Outcome.accept

    def exchange_and_accept(self: Outcome, *arguments: object) -> None:
        library = only_library(folder)
        (folder / "cache").rename(folder / "moved")
        library.parent.mkdir(parents=True)
        library.write_bytes(b"the library of an attacker")
        accept(self, *arguments)

    monkeypatch.setattr(Outcome, "accept", exchange_and_accept)
    loader = new_loader(folder / "csrc")
    assert loader.load("cpu"), loader.outcome("cpu").reasons
    assert loader.outcome("cpu").build_info["families"] == ["tiny"]


def test_build_stays_in_its_folder_when_the_cache_is_exchanged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, cache = folder / "compiler", folder / "cache"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-c*) ;; *) exec c++ "$@";; esac\n'
        f"if mv {cache} {folder}/moved; then\n"
        f"  mkdir -p {cache}/{__version__}\n"
        f"  ln -s {folder} {cache}/{__version__}/$(basename $PWD)\n"
        'fi\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MAX_JOBS", "1")
    loader = new_loader(folder / "csrc")
    assert loader.load("cpu"), loader.outcome("cpu").reasons
    assert loader.outcome("cpu").implementation == "built now"
    assert len(list(folder.glob("moved/*/*/*.so"))) == 2
    assert not list(folder.glob("*.o"))
