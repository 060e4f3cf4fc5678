"""Other Python processes that use this package, and waiting for what they do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import marginops

# The folder that holds the package, for PYTHONPATH.
INSTALLED = str(Path(marginops.__file__).resolve().parents[1])
# Seconds to wait for what takes a few. Only a failing test waits so long.
PATIENCE = 300


def python(code: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Starts a process that runs the code."""
    path = os.pathsep.join([INSTALLED, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(true: Callable[[], bool], every: float = 0.05) -> None:
    """Waits for a condition, and fails if it does not come. It looks ``every`` so many seconds."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(every)


def alive(process: int) -> bool:
    """Whether a process exists and has not ended."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text()
        return text.rpartition(")")[2].split()[0] != "Z"
    return False
