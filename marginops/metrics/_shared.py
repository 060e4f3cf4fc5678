"""What the metrics share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from .. import _checks as checks


class FixedDtypeMetric(Metric):
    """A metric whose state moves between devices but keeps its dtypes, in which it is exact."""

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)


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
