"""Helpers that all metrics share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .. import _advice as advice
from .. import _checks as checks


class FixedDtypeMetric(Metric):
    """A metric whose state keeps its dtypes, also in ``module.half()``. Only its device changes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


def check_columns(name: str, value: Any, rows: str, columns: int, device: torch.device) -> None:
    """Check a tensor ``[rows, columns]`` on the device of the metric's state."""
    checks.check_tensor(name, value, 2, f"[{rows}, {columns}]")
    if value.shape[1] != columns:
        raise ValueError(
            f"{name}: expected {columns} columns as in the arguments of the metric, "
            f"got shape {list(value.shape)}"
            f"{advice.for_transposed(name, value, None, columns)}"
        )
    if value.device != device:
        raise ValueError(
            f"{name}: expected device {device} as the metric, got {value.device}; "
            "move one of the two with .to()"
        )
