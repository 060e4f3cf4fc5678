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
        weights: ``[N]`` from :func:`marginops.training.samplers.order.as_weights`.
        margin: ``[N]`` float32.
        labels: ``[N]`` int64, classes >= 0.
        floor: In [0, k / N], so that k visits suffice.

    Returns:
        ``[N]`` float32, new weights.
    """
    preferred = torch.from_numpy(np.lexsort((margin.numpy(), -weights.numpy())))
    classes = labels[preferred]
    _, inverse, sizes = classes.unique(return_inverse=True, return_counts=True)
    needed = (floor * sizes.double() + 1e-9).floor()
    on_floor = preferred[rank_within_class(inverse) < needed[inverse]]
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


def rank_within_class(labels: Tensor) -> Tensor:
    """How many samples of the same class come before each sample, ``[N]`` int64."""
    by_class = labels.sort(stable=True)
    sizes = by_class.values.unique_consecutive(return_counts=True)[1]
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    ranks = torch.empty_like(labels)
    ranks[by_class.indices] = torch.arange(len(labels), device=labels.device) - starts
    return ranks


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
