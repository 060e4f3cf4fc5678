"""How a provider's call is checked and timed; the figures go to pytest-benchmark's JSON."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
PROVIDERS = ["marginops", "eager", "compile"]


@pytest.fixture
def time_call(benchmark: Any) -> Callable[..., None]:
    """Time ``call`` and note what it is, after one call whose result ``check`` accepts."""

    def run(
        call: Callable[[], Any], check: Callable[[Any], None], *, bytes_read: int, **what: Any
    ) -> None:
        check(call())
        benchmark.extra_info.update(what, bytes_read=bytes_read)

        def timed() -> None:
            call()
            if DEVICE != "cpu":
                torch.cuda.synchronize()

        benchmark(timed)

    return run


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` by ``torch.compile``, for the shapes of one benchmark."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def peak_memory(call: Callable[[], Any]) -> float:
    """MiB that a call needs beside what is there before, after one call that warms up."""
    call()
    if DEVICE != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what is free counts when it is used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 2**10


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])
