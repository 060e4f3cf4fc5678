"""The least number of visits of each class."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def with_class_floor(weights: Tensor, margin: Tensor, labels: Tensor, floor: float) -> Tensor:
    """Make visits certain until every class has ``floor`` of its samples among the certain ones.

    The samples with the largest weight come first, among equals those with the smallest margin. If
    some visits are certain already, their number stays, as far as the floors allow: of the samples
    above the floors, those with the largest margins lose their certainty.

    Args:
        weights: ``[N]`` from :func:`marginops.training.order.as_weights`.
        margin: ``[N]`` float32.
        labels: ``[N]`` int64, classes >= 0.
        floor: In [0, k / N], so that k visits suffice.

    Returns:
        ``[N]`` float32, new weights.
    """
    by_class = np.lexsort((margin.numpy(), -weights.numpy(), labels.numpy()))
    _, starts, sizes = np.unique(labels.numpy()[by_class], return_index=True, return_counts=True)
    rank = np.arange(len(by_class)) - np.repeat(starts, sizes)
    needed = np.floor(floor * sizes + 1e-9)
    on_floor = by_class[rank < np.repeat(needed, sizes)]
    certain = weights.isposinf()
    number = int(certain.sum())
    result = weights.clone()
    # Certain samples become as likely as the others, or drop out where all visits are certain.
    result[certain] = float((weights[~certain] > 0).any())
    result[on_floor] = torch.inf
    certain[on_floor] = False
    above = certain.nonzero().squeeze(1)
    smallest = margin[above].sort(stable=True).indices[: max(number - len(on_floor), 0)]
    result[above[smallest]] = torch.inf
    return result


def checked_labels(labels: Any, population: int) -> Tensor:
    """Check labels; returns them on the CPU."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor [N], got {type(labels).__name__}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels: expected dtype torch.int64, got {labels.dtype}")
    if list(labels.shape) != [population]:
        raise ValueError(
            f"labels: expected shape [{population}], one class for each sample, "
            f"got {list(labels.shape)}"
        )
    if population and int(labels.min()) < 0:
        raise ValueError(f"labels: expected classes >= 0, got {int(labels.min())}")
    return labels.cpu()
