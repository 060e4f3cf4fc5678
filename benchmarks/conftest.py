"""How a provider's call is checked and timed. The figures go to pytest-benchmark's JSON.

pytest-benchmark times the whole call, on a GPU until the GPU has finished. On a GPU the time
between two events around the call is measured too, each time after the cache was overwritten.
"""

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
PROVIDERS = ["marginops", "eager", "compile"]


def make_values(kind: str, random: torch.Tensor) -> torch.Tensor:
    """Random values, or values that are made from them and are hard for a kernel."""
    if kind == "tied":
        return random.mul(2).round()
    if kind == "sorted":
        return random.sort().values
    if kind == "equal":
        return torch.ones_like(random)
    if kind == "infinite":
        return torch.where(random > 0, torch.inf, random)
    return random


@pytest.fixture
def time_call(benchmark: Any) -> Callable[..., None]:
    """A function that times a call and records facts about it, after ``check`` has passed."""

    def run(
        call: Callable[[], Any],
        check: Callable[[Any], None],
        *,
        bytes_read: int,
        other_bytes: int = 0,
        **facts: Any,
    ) -> None:
        """``bytes_read`` is the size of the large input, ``other_bytes`` of all else that moves."""
        check(call())
        facts["dtype"] = str(facts["dtype"]).removeprefix("torch.")
        benchmark.extra_info.update(facts, bytes_read=bytes_read)
        benchmark.extra_info["mib_moved"] = (bytes_read + other_bytes) / 2**20

        def timed() -> None:
            call()
            if DEVICE != "cpu":
                torch.cuda.synchronize()

        benchmark(timed)
        if DEVICE != "cpu":
            benchmark.extra_info.update(gpu_figures(call))

    return run


def gpu_figures(call: Callable[[], Any]) -> dict[str, float]:
    """Median and interquartile range of the GPU's time for a call with a cold cache.

    The GPU waits before each call, so that the host has launched all kernels when the first one
    starts. Otherwise the host would be slower than short kernels.
    """
    began = time.perf_counter()
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / 3
    repeats = min(max(int(0.1 / seconds), 5), 50)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        larger_than_cache().zero_()
        torch.cuda._sleep(1_000_000)  # clocks: about 0.6 ms
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) for begin, end in events]
    low, median, high = numpy.percentile(times, (25, 50, 75))
    return {"gpu_ms": float(median), "gpu_iqr_ms": float(high - low)}


@functools.cache
def larger_than_cache() -> torch.Tensor:
    """Memory that replaces everything in the cache when it is written."""
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, compiled by ``torch.compile`` for the shapes of one benchmark."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def peer(name: str, call: Callable[[], Any], check: Callable[[Any], None]) -> None:
    """Skip with a reason if another library is missing or its call fails the check.

    A library whose first call failed is not called again, because its build may take long.
    """
    known = _peers.get(name)
    if known:
        pytest.skip(known)
    try:
        check(call())
    except Exception as error:
        reason = f"{name} does not run here: {type(error).__name__}: {error}"
        _peers.setdefault(name, reason)
        pytest.skip(reason)
    _peers[name] = ""


_peers: dict[str, str] = {}  # the reason why the first call failed, or an empty text


def peak_memory(call: Callable[[], Any]) -> float:
    """MiB of memory that a call needs in addition to that in use, after one call to warm up."""
    call()
    if DEVICE != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # so that memory that is used again counts
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 2**10


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])
