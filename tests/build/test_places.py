"""Where the cache lies: the choice of a place, and places that nobody else may have changed."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader, write_tiny
from helpers.processes import INSTALLED, PATIENCE
from marginops import __version__
from marginops._native import places
from marginops._native.loader import Loader, Outcome
from marginops.commands import doctor

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


@pytest.fixture(scope="module")
def built() -> Iterator[Path]:
    """A folder that all users may read, with tiny sources and a cache that has their library."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        folder.chmod(0o755)
        patch.setenv("MARGINOPS_CACHE_DIR", str(folder / "cache"))
        for variable in ("MARGINOPS_DISABLE_JIT", "CXX"):
            patch.delenv(variable, raising=False)
        assert new_loader(write_tiny(folder / "csrc")).load("cpu")
        yield folder


@pytest.fixture
def folder(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder."""
    for variable in ("MARGINOPS_DISABLE_JIT", "MARGINOPS_VERBOSE", "CXX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    with tempfile.TemporaryDirectory() as name:
        shutil.copytree(built, name, dirs_exist_ok=True)  # the mode, too
        monkeypatch.setenv("MARGINOPS_CACHE_DIR", f"{name}/cache")
        yield Path(name)


def only_library(folder: Path) -> Path:
    (found,) = folder.glob("cache/*/*/*.so")
    return found


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


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let root mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_place_on_a_file_system_without_programs(
    folder: Path, no_build: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(folder / "mnt", "noexec,size=10m,mode=755"):
        monkeypatch.setenv("MARGINOPS_CACHE_DIR", f"{folder}/mnt/cache")
        for _ in range(2):
            expect_reference(new_loader(folder / "csrc"), "segment.*noexec.*MARGINOPS_CACHE_DIR")
        shutil.copytree(folder / "cache", folder / "mnt/cache", dirs_exist_ok=True)
        expect_reference(new_loader(folder / "csrc"), "segment.*noexec.*MARGINOPS_CACHE_DIR")

        report = doctor.report(new_loader(folder / "csrc"), build=False)["cache"]
        assert report["folder"] == f"{folder}/mnt/cache"
        assert (report["usable"], report["writable"], report["loadable"]) == (False, True, False)
        assert "noexec" in report["obstacles"][0]
        assert all("noexec" in state for state in report["libraries"].values())

        # Without MARGINOPS_CACHE_DIR the next place is tried.
        monkeypatch.delenv("MARGINOPS_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", f"{folder}/mnt/xdg")
        (folder / ".cache").mkdir()
        (folder / "cache").rename(folder / ".cache/marginops")
        monkeypatch.setenv("HOME", str(folder))
        loader = new_loader(folder / "csrc")
        assert loader.load("cpu")
        assert loader.outcome("cpu").library.is_relative_to(folder / ".cache/marginops")
        report = doctor.report(loader, build=False)["cache"]
        assert report["folder"] == f"{folder}/.cache/marginops"
        assert "noexec" in report["other places"][0]


@pytest.mark.parametrize("size", ["4k", "16k", "32k", "48k"])
def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    with mounted(folder / "mnt", f"size={size},mode=755"):
        monkeypatch.setenv("MARGINOPS_CACHE_DIR", f"{folder}/mnt/cache")
        expect_reference(new_loader(folder / "csrc"), "")
        assert not list(Path(f"{folder}/mnt").rglob("building-*"))


def test_link_to_the_place_is_followed(folder: Path, no_build: None) -> None:
    (folder / "cache").rename(folder / "moved")
    (folder / "cache").symlink_to(folder / "moved")
    assert new_loader(folder / "csrc").load("cpu")
    (folder / "moved").rename(folder / "gone")
    expect_reference(new_loader(folder / "csrc"), "cache cannot be used: .*No such file")


def test_place_below_a_file(folder: Path, no_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", f"{folder}/csrc/module.cpp/cache")
    reason = "module.cpp/cache cannot be used: .*Not a directory.*; set MARGINOPS_CACHE_DIR to"
    expect_reference(new_loader(folder / "csrc"), reason)


def test_version_that_is_no_folder_is_replaced(folder: Path) -> None:
    version = folder / "cache" / __version__
    version.rename(folder / "moved")
    version.symlink_to(folder / "moved")
    places.make(folder / "cache").__exit__()
    assert version.is_dir()
    assert not version.is_symlink()
    assert list(version.iterdir()) == []


def test_missing_folders_are_made_with_safe_modes(folder: Path) -> None:
    before = os.umask(0)
    try:
        places.make(folder / "a/b/c").__exit__()
    finally:
        os.umask(before)
    made = [folder / "a", *(folder / "a").rglob("*")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o755] * 4


def test_too_many_open_files_is_no_damage(folder: Path, no_build: None) -> None:
    import resource

    loader: Loader = new_loader(folder / "csrc")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    make_plan = sys.modules[Loader.__module__].make_plan
    the_plan = make_plan("cpu", folder / "csrc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[Loader.__module__], "make_plan", lambda *_: the_plan)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    opened.append(os.open("/dev/null", os.O_RDONLY))
            os.close(opened.pop())
            os.close(opened.pop())
            outcome = loader.outcome("cpu", build=False)
        finally:
            for descriptor in opened:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "Too many open files" in " ".join(outcome.reasons)
    assert only_library(folder).is_file()


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
