"""The devices and dtypes that tests run on, and how each test starts."""

import os
import signal
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from helpers.ops import DTYPES, OTHER_LIBRARY

DEVICES = ["cpu"] + (["cuda:0"] if torch.cuda.is_available() else [])
# torch.compile keys its cache of gradients by the ops of the forward pass, so a changed backward of
# an op would not be seen.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile's cache does not tell instruction sets apart: a process that is limited to AVX2
    # takes a graph that was compiled for AVX-512, which then computes wrong numbers.
    cache = f"{tempfile.gettempdir()}/torchinductor-{os.getuid()}-{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
# No test looks for a model or a data set on a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A job in the background of a shell ignores interrupts, and so do the processes that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if OTHER_LIBRARY:
    torch.ops.load_library(OTHER_LIBRARY)

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("few", deadline=None, derandomize=True, max_examples=12)
hypothesis.settings.load_profile("few" if OTHER_LIBRARY else "ci")


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(20)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
