"""Finds, builds and loads the native libraries; nothing happens before the first op call."""

from __future__ import annotations

from .loader import Loader, NativeUnavailableWarning

__all__ = ["NativeUnavailableWarning", "load", "loader"]

loader = Loader()


def load(device_type: str) -> bool:
    """Whether compiled kernels for a device type are registered.

    The first call looks for them and compiles them if need be; later calls remember the answer.

    Args:
        device_type: as in ``tensor.device.type``.
    """
    return loader.load(device_type)
