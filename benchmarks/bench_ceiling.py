"""The limits of the GPU itself: copies of large tensors and of a single scalar."""

import pytest
import torch

from conftest import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="the limits of a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mebibytes", [0, 16, 256, 2048])
def bench_copy(time_call, mebibytes, dtype):
    size = max(1, mebibytes * 2**20 // dtype.itemsize)
    source = torch.randn(size, device=DEVICE).to(dtype)
    copy = torch.empty_like(source)
    time_call(
        lambda: copy.copy_(source),
        lambda result: torch.testing.assert_close(result, source),
        op="copy",
        shape=f"{mebibytes} MiB" if mebibytes else "1 scalar",
        dtype=dtype,
        provider="ceiling",
        bytes_read=size * dtype.itemsize,
        other_bytes=size * dtype.itemsize,
    )
