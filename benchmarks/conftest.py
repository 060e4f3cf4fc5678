"""How a provider's call is checked and timed; the figures go to pytest-benchmark's JSON.

What pytest-benchmark times is the whole call, on a GPU until it has finished. There, the time
between two events around the call is taken too, each time after the cache has been overwritten.
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
    """Random values, or what is made of them to be hard on a kernel; by the last dimension."""
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
    """Time ``call`` and note what it is, after one call whose result ``check`` accepts."""

    def run(
        call: Callable[[], Any],
        check: Callable[[Any], None],
        *,
        bytes_read: int,
        bytes_besides: int = 0,
        **what: Any,
    ) -> None:
        """``bytes_read`` are those of the large input, ``bytes_besides`` what else must move."""
        check(call())
        what["dtype"] = str(what["dtype"]).removeprefix("torch.")
        benchmark.extra_info.update(what, bytes_read=bytes_read)
        benchmark.extra_info["mib_moved"] = (bytes_read + bytes_besides) / 2**20

        def timed() -> None:
            call()
            if DEVICE != "cpu":
                torch.cuda.synchronize()

        benchmark(timed)
        if DEVICE != "cpu":
            benchmark.extra_info.update(gpu_figures(call))

    return run


def gpu_figures(call: Callable[[], Any]) -> dict[str, float]:
    """Median and interquartile range of the GPU's time for a call that finds a cold cache.

    The GPU waits for a while before each call, so that the host, which is slower with short
    kernels, has launched them all when the first one starts.
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
    """Memory to write, which leaves nothing else in the cache."""
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` by ``torch.compile``, for the shapes of one benchmark."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def peer(name: str, call: Callable[[], Any], check: Callable[[Any], None]) -> None:
    """Skip, and say why, where another library is missing or does not do the call right.

    One that could not do its first call is not asked again: building may be what takes its time.
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


_peers: dict[str, str] = {}  # why the first call failed, or nothing


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
