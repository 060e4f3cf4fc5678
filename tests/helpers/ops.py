"""What the tests of all ops use: dtypes, the two implementations, opcheck."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from marginops.ops._library import Op

# A library whose kernels replace those of the CPU in the tests: the emulated CUDA kernels.
OTHER_LIBRARY = os.environ.get("MARGINOPS_TEST_LIBRARY")
OP_TESTS = Path(__file__).resolve().parents[1] / "ops"
IMPLEMENTATIONS = ["native", "reference"]
OPS = torch.ops.marginops
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """Make public functions run the native kernels or the reference, which has no autograd here."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "reference":
            patch.setattr(Op, "__call__", lambda op, *arguments: op.reference(*arguments))
        yield


def head(device, dtype=torch.float64, rows=12, classes=6, columns=5):
    tensors = torch.randn(rows, classes), torch.randn(classes, columns), torch.randn(classes)
    return tuple(value.to(device, dtype).requires_grad_() for value in tensors)


def opcheck(name, *arguments):
    """Run all checks of torch on the op and on the op that has its kernels."""
    torch.library.opcheck(getattr(OPS, name).default, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(getattr(torch.ops.marginops_kernels, name).default, detached)
