"""How results of many values print."""

from typing import Any

import torch


def describe(result: Any) -> str:
    """The dtype and shape of each field of a named tuple of tensors, and their device.

    No value is printed, so printing does not wait for the GPU.
    """
    fields = [
        f"{name}={str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        if isinstance(value, torch.Tensor)
        else f"{name}={value}"
        for name, value in zip(result._fields, result, strict=True)
    ]
    return f"{type(result).__name__}({', '.join(fields)}, device={result[0].device})"
