"""Places for the cache: odd file systems, links, and folders that are missing or in the way."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader, only_library
from marginops import __version__
from marginops._native import places
from marginops._native.loader import Loader
from marginops.commands import doctor


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


def test_another_process_may_remove_the_probe_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = os.open

    def create_and_lose(name: str, flags: int, *arguments: int, dir_fd: int) -> int:
        descriptor = create(name, flags, *arguments, dir_fd=dir_fd)
        os.unlink(name, dir_fd=dir_fd)
        return descriptor

    folder = create(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(os, "open", create_and_lose)
    probe = places.probe_file(folder)
    assert os.fstat(probe).st_size > 0 and os.listdir(tmp_path) == []
    os.close(probe)
    os.close(folder)
