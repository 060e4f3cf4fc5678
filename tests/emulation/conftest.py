"""What the tests of the emulation need of the machine."""

import pytest

from helpers.emulation import harness


@pytest.fixture(autouse=True)
def _can_emulate() -> None:
    if reason := harness.missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def tsan() -> str:
    """The tool of that name; skips where ThreadSanitizer does not start."""
    result = harness.run_python("tsan", ["-c", "pass"])
    if result.returncode:
        pytest.skip(f"ThreadSanitizer does not start here: {result.stderr[-300:]}")
    return "tsan"


@pytest.fixture(params=harness.TOOLS)
def tool(request: pytest.FixtureRequest) -> str:
    """Each of the tools that kernels are built with."""
    return request.getfixturevalue("tsan") if request.param == "tsan" else request.param
