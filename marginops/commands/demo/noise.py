"""Wrong labels on purpose, and how many of them ``label_issues`` finds."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...training import DataMap, TrainingDynamics
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


@dataclass(frozen=True, eq=False)
class NoiseReport:
    """What training dynamics say about labels of which some are flipped.

    Attributes:
        flipped: ``[N]`` bool, whose label is flipped.
        data_map: The data map of the dynamics.
        found: How many of the most suspicious samples have a flipped label. As many samples are
            taken as there are flipped labels.
        auroc: The probability that a sample with a flipped label is more suspicious than another.
        average_precision: The mean of the precision over all numbers of suspicious samples.
    """

    flipped: Tensor
    data_map: DataMap
    found: int
    auroc: float
    average_precision: float

    def text(self) -> str:
        """The numbers in words."""
        flipped, samples = int(self.flipped.sum()), len(self.flipped)
        return (
            f"{flipped:,} of the {samples:,} training labels are flipped. Of the {flipped:,} most "
            f"suspicious samples after a uniform run, {self.found:,} have a flipped label; by "
            f"chance it would be {flipped * flipped / samples:,.0f}.\nlabel_issues: AUROC "
            f"{self.auroc:.4f}, average precision {self.average_precision:.4f}"
        )

    def numbers(self) -> dict[str, Any]:
        """The numbers, as values that JSON can hold."""
        return {
            "flipped": int(self.flipped.sum()),
            "found": self.found,
            "auroc": self.auroc,
            "average_precision": self.average_precision,
        }


def find_flipped(dynamics: TrainingDynamics, flipped: Tensor) -> NoiseReport:
    """Look for flipped labels in the dynamics of one run.

    Args:
        dynamics: The dynamics. A sample that they never saw counts as the least suspicious.
        flipped: ``[N]`` bool on the CPU, whose label is flipped: some, but not all.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    suspicious = dynamics.label_issues().indices.cpu()
    unseen = (dynamics.count.cpu() == 0).nonzero().squeeze(1)
    in_order = flipped[torch.cat([suspicious, unseen])]
    suspicion = -torch.arange(len(flipped))
    return NoiseReport(
        flipped=flipped,
        data_map=dynamics.data_map(),
        found=int(in_order[: int(flipped.sum())].sum()),
        auroc=float(roc_auc_score(in_order, suspicion)),
        average_precision=float(average_precision_score(in_order, suspicion)),
    )
