"""Files to score, and the check of an error of ``marginops score``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import marginops

if TYPE_CHECKING:
    from helpers.score_files import Embeddings


@pytest.fixture
def files(tmp_path: Path) -> Embeddings:
    """Embeddings and a head. The native library is loaded: what it says then is not the command's.

    The helper needs pyarrow, which only tests of scoring need.
    """
    from helpers.score_files import Embeddings

    marginops.select_smallest(torch.zeros(2), 1)
    return Embeddings(tmp_path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Check the exit status and the one line, a regular expression."""

    def check(status: int, message: str, expected: int = 2) -> None:
        printed = capsys.readouterr()
        assert status == expected, printed.err
        assert printed.err.count("\n") == 1, printed.err
        assert re.fullmatch(rf"marginops score: {message}\n", printed.err), printed.err
        assert printed.out == ""

    return check
