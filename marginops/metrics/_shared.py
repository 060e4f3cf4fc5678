"""Helpers that all metrics share."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _advice as advice
from .. import _checks as checks

Summary = TypeVar("Summary")


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


def new_axes(ax: Any) -> Any:
    """Axes of matplotlib: those that are given, else new ones."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ImportError("plot needs matplotlib; run pip install matplotlib") from error
    return pyplot.subplots()[1] if ax is None else ax


def as_series(val: Any, kind: type[Summary]) -> list[Summary]:
    """One or several summaries as a list."""
    series = [val] if isinstance(val, kind) or not isinstance(val, Sequence) else list(val)
    for summary in series:
        if not isinstance(summary, kind):
            raise TypeError(f"val: expected {kind.__name__}, got {type(summary).__name__}")
    if not series:
        raise ValueError(f"val: expected at least one {kind.__name__}, got none")
    return series


def plot_values(ax: Any, values: Mapping[str, Tensor]) -> None:
    """Draw one bar for each value."""
    ax.bar(list(values), [float(value) for value in values.values()])


def plot_steps(ax: Any, series: Sequence[Mapping[str, Tensor]], title: str) -> None:
    """Draw a line over the steps for each value."""
    for name in series[0]:
        ax.plot([float(values[name]) for values in series], marker="o", label=name)
    ax.legend(title=title)
    ax.set(xlabel="step")
