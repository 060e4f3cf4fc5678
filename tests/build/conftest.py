"""What most tests of builds start from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.native_sources import new_loader, write_tiny
from marginops._native import jit


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A csrc folder that compiles in a second."""
    return write_tiny(tmp_path / "csrc")


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a build fail the test."""
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("the library is built"))


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
