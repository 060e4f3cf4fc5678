"""Helpers that all metrics share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks


def check_columns(name: str, value: Any, rows: str, columns: int, device: torch.device) -> None:
    """Check a tensor ``[rows, columns]`` on the device of the metric's state."""
    checks.check_tensor(name, value, 2, f"[{rows}, {columns}]")
    if value.shape[1] != columns:
        raise ValueError(
            f"{name}: expected {columns} columns as in the arguments of the metric, "
            f"got shape {list(value.shape)}"
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


def plot_values(ax: Any, values: Mapping[str, Tensor]) -> None:
    """Draw one bar for each value."""
    ax.bar(list(values), [float(value) for value in values.values()])


def plot_steps(ax: Any, series: Sequence[Mapping[str, Tensor]], title: str) -> None:
    """Draw a line over the steps for each value."""
    names = list(series[0]) if series else []
    for name in names:
        ax.plot([float(values[name]) for values in series], marker="o", label=name)
    if names:
        ax.legend(title=title)
    ax.set(xlabel="step")
