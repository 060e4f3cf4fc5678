"""Checks the arguments of a RunRecorder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .numbers import number


def checked_names(names: Any) -> list[str] | None:
    """The names of classes as a list, if there are any."""
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"class_names: expected a sequence of str, got {type(names).__name__}")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class_names: expected a sequence of str, got {name!r} in it")
    return list(names)


def checked_number(name: str, value: Any) -> float | None:
    """A number of the user, with six digits. None replaces NaN and infinities."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {list(value.shape)}")
        return number(value.detach())
    # The numbers of numpy have this method, too.
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    return number(value)
