"""What the tests of the claims share."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

CLAIMS = Path(__file__).resolve().parents[2] / "benchmarks" / "claims"


@pytest.fixture(scope="session", autouse=True)
def importable() -> Iterator[None]:
    """The modules of benchmarks/claims."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CLAIMS))
        yield


@pytest.fixture
def claims() -> Callable[[str], ModuleType]:
    """``claims(name)``: a module of benchmarks/claims, for example ``trainings.loop``."""
    return importlib.import_module
