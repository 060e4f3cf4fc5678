"""What a network has made of its training data: margins, neural collapse and class manifolds."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import homogeneity
from .metrics import (
    ClassManifolds,
    ClassManifoldsSummary,
    MarginDistribution,
    MarginSummary,
    NeuralCollapse,
    NeuralCollapseSummary,
)
from .norms import log_norm_product
from .ops.statistics import sample_statistics
from .training import ClassificationData, evaluation_mode, last_linear, predict

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class EpochReport:
    """A network seen from its N training samples; tensors are on the CPU.

    Attributes:
        training_error: Share of the training samples that are misclassified.
        test_accuracy: Share of the test samples that are classified correctly.
        misclassified: ``[N]`` bool, in the order of the training data.
        margins: ``[N]``, margins divided by the product of the layers' Frobenius norms.
        log_norm: Logarithm of that product.
        distribution: Of ``margins``, see :class:`marginops.metrics.MarginDistribution`; its support
            vectors count for something only where margins are not normalised.
        collapse: Of the input of the last layer and its weight, see
            :class:`marginops.metrics.NeuralCollapse`.
        manifolds: Of the input of the last layer on the unit sphere, see
            :class:`marginops.metrics.ClassManifolds`.
        tau_margin: The smallest margin, normalised by the scale tau
            (:func:`marginops.homogeneity.normalized_margin`); NaN without rates.
        lambda_max_margin: The same by the parameters of the largest rate.
    """

    training_error: float
    test_accuracy: float
    misclassified: Tensor
    margins: Tensor
    log_norm: float
    distribution: MarginSummary
    collapse: NeuralCollapseSummary
    manifolds: ClassManifoldsSummary
    tau_margin: float
    lambda_max_margin: float


def observe(
    network: nn.Module,
    data: ClassificationData,
    *,
    head: nn.Linear | None = None,
    rates: Mapping[str, float] | None = None,
    chunk_size: int = 4096,
) -> EpochReport:
    """Look at a network after an epoch, in evaluation mode and without gradient.

    Reads the training data twice: NC4 needs the class means before it can compare with them.

    Args:
        network: Maps inputs ``[B, ...]`` to logits ``[B, C]``; it stays as it is.
        data: On the device of ``network``.
        head: The layer that computes the logits from features ``[B, D]``; by default
            :func:`marginops.training.last_linear`.
        rates: Those of :func:`marginops.homogeneity.rates`, computed once for all epochs; without
            them the two Lambda-normalised margins are NaN.
        chunk_size: Samples in one forward pass.

    Returns:
        :class:`EpochReport`.

    Raises:
        ValueError: The head cannot be told, or ``rates`` are those of another network.

    Example:
        >>> import torch
        >>> from marginops import homogeneity
        >>> from marginops.observer import observe
        >>> from marginops.training import InversionMonitor, load_digits
        >>> data = load_digits()
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> rates = homogeneity.rates(network, data.train_inputs[:2])
        >>> monitor = InversionMonitor(data.num_classes)
        >>> report = observe(network, data, rates=rates)  # from here on after every epoch
        >>> monitor.update(report.manifolds.radius, report.misclassified, data.train_target)
        >>> report.margins.shape, report.manifolds.radius.shape
        (torch.Size([1347]), torch.Size([10]))
    """
    head = head or last_linear(network, data.num_classes)
    shape, device = (data.num_classes, head.in_features), data.train_target.device
    distribution = MarginDistribution(quantiles=QUANTILES).to(device)
    collapse, manifolds = NeuralCollapse(*shape).to(device), ClassManifolds(*shape).to(device)
    log_norm = log_norm_product(network).detach()
    margins, misclassified = [], []
    targets = data.train_target.split(chunk_size)
    outputs = _outputs(network, head, data.train_inputs, chunk_size)
    for (features, logits), target in zip(outputs, targets, strict=True):
        statistics = sample_statistics(logits, target, log_norm=log_norm)
        margins.append(statistics.margin)
        misclassified.append(~statistics.correct)
        distribution.update(statistics.margin)
        collapse.update(features, target, head.weight)
        manifolds.update(features, target)
    for features, logits in _outputs(network, head, data.train_inputs, chunk_size):
        collapse.update_nearest(features, logits)

    wrong = torch.cat(misclassified)
    summary = distribution.compute()
    smallest = summary.minimum.double() * log_norm.double().exp()

    def rescaled(version: Literal["tau", "lambda_max"]) -> float:
        if rates is None:
            return math.nan
        margin = homogeneity.normalized_margin(smallest.reshape(1), network, rates, version=version)
        return margin.item()

    predicted = predict(network, data.test_inputs, chunk_size=chunk_size).argmax(1)
    return EpochReport(
        training_error=wrong.double().mean().item(),
        test_accuracy=(predicted == data.test_target).double().mean().item(),
        misclassified=wrong.cpu(),
        margins=torch.cat(margins).cpu(),
        log_norm=log_norm.item(),
        distribution=MarginSummary._make(value.cpu() for value in summary),
        collapse=NeuralCollapseSummary._make(value.cpu() for value in collapse.compute()),
        manifolds=ClassManifoldsSummary._make(value.cpu() for value in manifolds.compute()),
        tau_margin=rescaled("tau"),
        lambda_max_margin=rescaled("lambda_max"),
    )


def _outputs(
    network: nn.Module, head: nn.Linear, inputs: Tensor, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and logits, chunk by chunk."""
    caught: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
    try:
        for chunk in inputs.split(chunk_size):
            with evaluation_mode(network), torch.no_grad():
                logits = network(chunk)
            yield caught.pop(), logits
    finally:
        hook.remove()
