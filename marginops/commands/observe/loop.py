"""The training loop of ``marginops observe``, with a report after every epoch."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ...homogeneity import rates
from ...nn import MultiMarginRegularization
from ...training import EpochReport, InversionMonitor, RunRecorder, report_epoch
from ..data import ClassificationData
from ..models import Model, first_line
from ..options import MOMENTUM, UsageError


@dataclass
class Observation:
    """A network, what can be measured of it, its inversion monitor, and a report of every epoch.

    Attributes:
        model: The network, trained or not yet.
        inversion: The radii of the classes, and when they stop falling.
        rates: The rates of the parameters; None if the network has none.
        log_norm: The ``log_norm`` of :func:`marginops.training.report_epoch`: None for margins that
            are divided by the product of the layers' norms, 0 where that is not defined.
        left_out: A sentence for each number that is not defined for the network.
        reports: The report of every epoch so far.
    """

    model: Model
    inversion: InversionMonitor
    rates: dict[str, float] | None = None
    log_norm: float | None = None
    left_out: list[str] = field(default_factory=list)
    reports: list[EpochReport] = field(default_factory=list)

    @property
    def inversions(self) -> list[int | None]:
        """The epoch of the inversion of each class; None for a class without inversion so far."""
        epochs = self.inversion.epoch
        assert isinstance(epochs, list)
        return epochs


def begin(model: Model, data: ClassificationData) -> Observation:
    """Find out what can be measured of a network."""
    observation = Observation(model, InversionMonitor(data.num_classes))
    problem = model.norm_problem(data.train_inputs)
    if problem is not None:
        observation.log_norm = 0.0
        observation.left_out.append(f"The margins are not divided by layer norms ({problem}).")
    try:
        observation.rates = rates(model.network, data.train_inputs[:2])
    except (TypeError, ValueError) as error:
        observation.left_out.append(
            f"The margin at scale 1 is left out, because it needs rates ({first_line(error)})."
        )
    return observation


def watch(
    observation: Observation,
    data: ClassificationData,
    options: argparse.Namespace,
    on_epoch: Callable[[int, EpochReport], None],
    recorder: RunRecorder | None = None,
) -> Observation:
    """Train the network, report on it after every epoch, and record it if there is a recorder."""
    model = observation.model
    optimizer = torch.optim.SGD(
        model.network.parameters(), lr=options.learning_rate, momentum=MOMENTUM
    )
    regularization = MultiMarginRegularization(options.epochs).to(options.device)
    batch_size = min(options.batch_size, len(data.train_target))
    for epoch in range(options.epochs):
        regularization.set_epoch(epoch)
        for rows in torch.randperm(len(data.train_target)).split(batch_size):
            rows = rows.to(options.device)
            target = data.train_target[rows]
            logits, features = model.logits_and_features(data.train_inputs[rows])
            loss = F.cross_entropy(logits, target)
            if options.regularize:
                loss = loss + regularization(features, model.head.weight, target, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if recorder is not None:
                recorder.update(rows, logits.detach(), target)
        seen = report_epoch(
            model.network,
            data.train_inputs,
            data.train_target,
            test_inputs=data.test_inputs,
            test_target=data.test_target,
            head=model.head,
            rates=observation.rates,
            log_norm=observation.log_norm,
        )
        if not math.isfinite(seen.distribution.mean):
            raise UsageError(f"training diverged in epoch {epoch + 1}; lower --learning-rate")
        observation.inversion.update(
            seen.manifolds.radius, seen.misclassified, data.train_target.cpu()
        )
        observation.reports.append(seen)
        if recorder is not None:
            recorder.end_epoch(epoch + 1, report=seen)
        on_epoch(epoch + 1, seen)
    return observation
