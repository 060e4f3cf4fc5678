"""What the tests of the claims share."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """``claims(name)``: a module of benchmarks/claims, for example ``trainings.loop``."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    return importlib.import_module
