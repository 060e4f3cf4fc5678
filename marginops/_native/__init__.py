"""Finds, builds and loads the native libraries; nothing happens before the first op call."""

from __future__ import annotations

from .loader import Loader, NativeUnavailableWarning

__all__ = ["NativeUnavailableWarning", "load", "loader"]

loader = Loader()


def load(device_type: str) -> bool:
    """Load the compiled kernels of a device type, and return whether there are any.

    The first call looks for them, and compiles them if it finds none. Later calls only return the
    answer of the first.

    Args:
        device_type: The device type, as in ``tensor.device.type``.
    """
    return loader.load(device_type)
