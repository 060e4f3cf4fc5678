"""What most tests of builds start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.native_sources import write_tiny
from marginops._native import jit


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A csrc folder that compiles in a second."""
    return write_tiny(tmp_path / "csrc")


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a build fail the test."""
    monkeypatch.setattr(jit, "build", lambda *_: pytest.fail("the library is built"))
