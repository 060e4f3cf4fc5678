"""How a provider's call is checked and timed; the figures go to pytest-benchmark's JSON."""

from collections.abc import Callable
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
