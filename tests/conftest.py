"""Devices, dtypes and the two implementations that every test of an op runs on."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from marginops.ops._library import Op

DEVICES = ["cpu"] + (["cuda:0"] if torch.cuda.is_available() else [])
# Kernels to test instead of those of the CPU: the emulated ones of CUDA, see test_cudacpu.py.
OTHER_LIBRARY = os.environ.get("MARGINOPS_TEST_LIBRARY")
if OTHER_LIBRARY:
    torch.ops.load_library(OTHER_LIBRARY)

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("few", deadline=None, derandomize=True, max_examples=12)
hypothesis.settings.load_profile("few" if OTHER_LIBRARY else "ci")

HERE = Path(__file__).resolve().parent
OP_TESTS = [
    str(path)
    for family in (
        "margin",
        "select",
        "statistics",
        "linear",
        "moments",
        "regularization",
        "distribution",
    )
    for path in sorted(HERE.glob(f"test_{family}*.py"))
]
IMPLEMENTATIONS = ["native", "reference"]
OPS = torch.ops.marginops
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Inside, public functions run the native kernels or, without autograd, the reference."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "reference":
            patch.setattr(Op, "__call__", lambda op, *arguments: op.reference(*arguments))
        yield


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


def head(device, dtype=torch.float64, rows=12, classes=6, columns=5):
    tensors = torch.randn(rows, classes), torch.randn(classes, columns), torch.randn(classes)
    return tuple(value.to(device, dtype).requires_grad_() for value in tensors)


def opcheck(name, *arguments):
    """Every check of the op, and of the kernel's op behind a differentiable one."""
    torch.library.opcheck(getattr(OPS, name).default, arguments)
    if hasattr(OPS, f"{name}_forward"):
        detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.library.opcheck(getattr(OPS, f"{name}_forward").default, detached)
