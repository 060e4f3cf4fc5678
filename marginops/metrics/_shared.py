"""What the metrics of class geometry share: their arguments' checks."""

from typing import Any

import torch

from ..ops import _checks as checks


def check_at_least(name: str, value: Any, least: int) -> None:
    """An integer, not too small."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_columns(name: str, value: Any, rows: str, columns: int, device: torch.device) -> None:
    """[``rows``, ``columns``], where the state of the metric lies."""
    checks.check_tensor(name, value, 2, f"[{rows}, {columns}]")
    if value.shape[1] != columns:
        raise ValueError(
            f"{name}: expected {columns} columns as the metric was made for, "
            f"got shape {list(value.shape)}"
        )
    if value.device != device:
        raise ValueError(
            f"{name}: expected device {device} as the metric, got {value.device}; "
            "move one of them with .to()"
        )
