"""The training loop of ``marginops observe``, with a report after every epoch."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from ...homogeneity import rates
from ...nn import MultiMarginRegularization
from ...training import EpochReport, InversionMonitor, report_epoch
from ..data import ClassificationData
from ..options import MOMENTUM, UsageError
from ..preparation import mlp


@dataclass
class Observation:
    """The trained network, its rates, its inversion monitor, and the report of every epoch."""

    network: nn.Sequential
    rates: dict[str, float]
    inversion: InversionMonitor
    reports: list[EpochReport] = field(default_factory=list)

    @property
    def inversions(self) -> list[int | None]:
        """The epoch of the inversion of each class; None for a class without inversion so far."""
        epochs = self.inversion.epoch
        assert isinstance(epochs, list)
        return epochs


def watch(
    data: ClassificationData,
    options: argparse.Namespace,
    on_epoch: Callable[[int, EpochReport], None],
) -> Observation:
    """Train a network, and report on it after every epoch."""
    torch.manual_seed(options.seed)
    network = mlp(data, options.hidden).to(options.device)
    head = network[-1]
    assert isinstance(head, nn.Linear)
    optimizer = torch.optim.SGD(network.parameters(), lr=options.learning_rate, momentum=MOMENTUM)
    regularization = MultiMarginRegularization(options.epochs).to(options.device)
    observation = Observation(
        network, rates(network, data.train_inputs[:2]), InversionMonitor(data.num_classes)
    )
    batch_size = min(options.batch_size, len(data.train_target))
    for epoch in range(options.epochs):
        regularization.set_epoch(epoch)
        for rows in torch.randperm(len(data.train_target)).split(batch_size):
            rows = rows.to(options.device)
            target = data.train_target[rows]
            features = network[:-1](data.train_inputs[rows])
            logits = head(features)
            loss = F.cross_entropy(logits, target)
            if options.regularize:
                loss = loss + regularization(features, head.weight, target, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen = report_epoch(
            network,
            data.train_inputs,
            data.train_target,
            test_inputs=data.test_inputs,
            test_target=data.test_target,
            head=head,
            rates=observation.rates,
        )
        if not math.isfinite(seen.distribution.mean):
            raise UsageError(f"training diverged in epoch {epoch + 1}; lower --learning-rate")
        observation.inversion.update(
            seen.manifolds.radius, seen.misclassified, data.train_target.cpu()
        )
        observation.reports.append(seen)
        on_epoch(epoch + 1, seen)
    return observation
