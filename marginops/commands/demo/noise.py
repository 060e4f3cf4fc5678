"""Wrong labels on purpose, and how many of them ``label_issues`` finds."""

from dataclasses import replace

import torch
from torch import Tensor

from ..data import ClassificationData


def flip_labels(
    data: ClassificationData, share: float, seed: int
) -> tuple[ClassificationData, Tensor]:
    """Give a share of the training samples another label, each other class with equal probability.

    Args:
        data: The data.
        share: The share of the training samples, in [0, 1).
        seed: Which samples and labels these are.

    Returns:
        The data with the new labels, and ``[N]`` bool on the CPU: whose label is another one.
    """
    samples = len(data.train_target)
    flipped = torch.zeros(samples, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(samples, generator=generator)[: round(share * samples)]
    shift = torch.randint(1, data.num_classes, (len(rows),), generator=generator)
    flipped[rows] = True
    target = data.train_target.cpu().clone()
    target[rows] = (target[rows] + shift) % data.num_classes
    return replace(data, train_target=target.to(data.train_target.device)), flipped


class NoiseReport: ...


def find_flipped(dynamics, flipped):
    return None
