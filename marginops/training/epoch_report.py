"""The report of an epoch: margins, neural collapse and class manifolds of a network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import homogeneity
from .._checks import check_int, check_target, check_tensor
from ..metrics import (
    ClassManifolds,
    ClassManifoldsSummary,
    MarginDistribution,
    MarginSummary,
    NeuralCollapse,
    NeuralCollapseSummary,
)
from ..networks import (
    check_inputs,
    evaluation_mode,
    features_and_logits,
    predict,
    unwrap,
)
from ..norms import log_norm_product
from ..ops.arguments import as_log_norm
from ..ops.margin_pair import normalize
from ..ops.statistics import sample_statistics
from .selection.head_kinds import check_head_type, find_linear, head_weight
from .selection.heads import check_head, is_checked

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class EpochReport:
    """The report of :func:`marginops.training.report_epoch`. All tensors are on the CPU.

    Attributes:
        training_error: The share of misclassified training samples.
        test_accuracy: The share of correctly classified test samples; NaN without test samples.
        misclassified: ``[N]`` bool, in the order of the training data.
        margins: ``[N]``, classification margins of the training samples, divided by the norm of the
            network.
        log_norm: The logarithm of that norm, by default of the product of the layers' Frobenius
            norms.
        distribution: The distribution of ``margins``, see
            :class:`marginops.metrics.MarginDistribution`. Its support vectors have no meaning here,
            because they need margins that are not normalised.
        collapse: Neural collapse of the input of the last layer and of its weight, see
            :class:`marginops.metrics.NeuralCollapse`.
        manifolds: Class manifolds of the input of the last layer on the unit sphere, see
            :class:`marginops.metrics.ClassManifolds`.
        tau_margin: The smallest margin divided by the scale of the network, see
            :func:`marginops.homogeneity.log_scale`, in the version ``"tau"``; NaN without rates.
        lambda_max_margin: The same in the version ``"lambda_max"``.
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


def report_epoch(
    network: nn.Module,
    inputs: Tensor,
    target: Tensor,
    *,
    test_inputs: Tensor | None = None,
    test_target: Tensor | None = None,
    num_classes: int | None = None,
    head: nn.Module | None = None,
    weight: Tensor | None = None,
    rates: Mapping[str, float] | None = None,
    log_norm: Tensor | float | None = None,
    chunk_size: int = 4096,
) -> EpochReport:
    """Report margins, neural collapse and class manifolds of a network after an epoch.

    The margins are those of Banburski et al. (2021) and Kunin et al. (2023), neural collapse that
    of Papyan, Han, Donoho (2020), and the class manifolds those of Ciceri et al. (2024).

    Args:
        network: A network that maps inputs ``[B, ...]`` to logits ``[B, C]``, see
            :func:`marginops.networks.output_tensor`. It may have wrappers, see
            :func:`marginops.networks.unwrap`. The function does not change it.
        inputs: ``[N, ...]``, N >= 1, the training inputs, on the device of ``network``.
        target: ``[N]`` int64, the classes of the training inputs.
        test_inputs: ``[M, ...]``, inputs that the network does not train on.
        test_target: ``[M]`` int64, the classes of the test inputs.
        num_classes: The number of classes C. The default is the number of rows of ``weight`` or of
            outputs of ``head``; without both the largest target plus one.
        head: The layer that computes the logits from features ``[B, D]``, as
            ``F.linear(features, weight, bias)``. It may have LoRA of PEFT, as in
            :func:`marginops.training.select_batch`. By default the function looks for a linear
            layer with C outputs. With ``weight`` it may be any module.
        weight: ``[C, D]``, the weight in neural collapse. By default it is the weight of ``head``,
            and the function checks as :func:`marginops.training.select_batch` that the logits
            follow from it.
        rates: The result of :func:`marginops.homogeneity.rates`, which is the same for all epochs.
            Without it ``tau_margin`` and ``lambda_max_margin`` are NaN.
        log_norm: The logarithm of the norm that divides the margins, a float or a 0-d tensor. The
            default is :func:`marginops.log_norm_product`, which is not defined for networks
            with embeddings, attention or adapters. With 0 the margins are not divided.
        chunk_size: The number of samples in one forward pass.

    Returns:
        :class:`marginops.training.EpochReport`.

    Raises:
        TypeError, ValueError: An argument has the wrong type or shape, no linear layer or more than
            one has C outputs, the logits do not follow from the weight of ``head``, ``rates``
            belong to another network, or the norm product of ``network`` is not defined.
        RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
            assertion.

    The network runs in evaluation mode and without gradient, twice on the training data and once
    on the test data. The second pass is for NC1 and NC4, which need the class means of the first
    one. The function waits for the device.

    Example:
        >>> import torch
        >>> from marginops import homogeneity
        >>> from marginops.training import InversionMonitor, report_epoch
        >>> inputs, target = torch.randn(60, 8), torch.arange(60) % 3
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
        >>> rates = homogeneity.rates(network, inputs[:2])
        >>> monitor = InversionMonitor(num_classes=3)
        >>> report = report_epoch(network, inputs, target, rates=rates)  # after every epoch
        >>> monitor.update(report.manifolds.radius, report.misclassified, target)
        >>> report.margins.shape, report.manifolds.radius.shape
        (torch.Size([60]), torch.Size([3]))
    """
    _check_samples(inputs, target, test_inputs, test_target)
    check_int("chunk_size", chunk_size, 1)
    network = unwrap(network)
    # In training mode, reading a weight under spectral_norm would change it.
    with evaluation_mode(network):
        layer, sizes = _head_and_sizes(network, target, num_classes, head, weight)
        if weight is None and not is_checked(network, layer):
            check_head(network, inputs[:64], layer)
        device = target.device
        distribution = MarginDistribution(quantiles=QUANTILES).to(device)
        collapse = NeuralCollapse(*sizes, two_passes=True).to(device)
        manifolds = ClassManifolds(*sizes).to(device)
        norm = as_log_norm(log_norm, torch.empty(0, dtype=torch.float64, device=device))
        if norm is None:
            norm = log_norm_product(network, example_input=inputs[:2])
        norm = norm.detach()
        margins, smallest, misclassified = [], [], []
        chunks = inputs.split(chunk_size)
        for chunk, labels in zip(chunks, target.split(chunk_size), strict=True):
            features, logits = features_and_logits(network, chunk, layer)
            statistics = sample_statistics(logits, labels)
            margins.append(normalize(statistics.margin, norm))
            smallest.append(statistics.margin.amin())
            misclassified.append(~statistics.correct)
            distribution.update(margins[-1])
            collapse.update(features, labels, head_weight(layer) if weight is None else weight)
            manifolds.update(features, labels)
        for chunk, labels in zip(chunks, target.split(chunk_size), strict=True):
            collapse.update_nearest(*features_and_logits(network, chunk, layer), labels)

        wrong = torch.cat(misclassified)
        # The normalised margins may underflow, so the smallest margin comes from the others.
        smallest_margin = torch.stack(smallest).amin().double()

        def margin_at_scale_one(version: Literal["tau", "lambda_max"]) -> float:
            if rates is None:
                return math.nan
            scale = homogeneity.log_scale(network, rates, version=version)
            return normalize(smallest_margin, scale).item()

        test_accuracy = math.nan
        if test_inputs is not None and test_target is not None:
            predicted = predict(network, test_inputs, chunk_size=chunk_size).argmax(1)
            test_accuracy = predicted.eq(test_target).double().mean().item()
        return EpochReport(
            training_error=wrong.double().mean().item(),
            test_accuracy=test_accuracy,
            misclassified=wrong.cpu(),
            margins=torch.cat(margins).cpu(),
            log_norm=norm.item(),
            distribution=distribution.cpu().compute(),
            collapse=NeuralCollapseSummary._make(value.cpu() for value in collapse.compute()),
            manifolds=ClassManifoldsSummary._make(value.cpu() for value in manifolds.compute()),
            tau_margin=margin_at_scale_one("tau"),
            lambda_max_margin=margin_at_scale_one("lambda_max"),
        )


def _head_and_sizes(
    network: nn.Module, target: Tensor, num_classes: int | None, head: Any, weight: Any
) -> tuple[Any, tuple[int, int]]:
    """The head, and the numbers of classes and features."""
    if weight is None:
        check_head_type(head)
        if num_classes is None:
            num_classes = int(target.max()) + 1 if head is None else head.out_features
        head = head or find_linear(network, num_classes)
        return head, (num_classes, head.in_features)
    check_tensor("weight", weight, 2, "[C, D]")
    if num_classes not in (None, len(weight)):
        raise ValueError(f"weight: expected {num_classes} rows, got shape {list(weight.shape)}")
    if head is None:
        head = find_linear(network, len(weight))
    elif not isinstance(head, nn.Module):
        raise TypeError(f"head: expected a torch.nn.Module, got {type(head).__name__}")
    return head, (weight.shape[0], weight.shape[1])


def _check_samples(inputs: Any, target: Any, test_inputs: Any, test_target: Any) -> None:
    """Check the training samples, and the test samples if there are any."""
    if (test_inputs is None) != (test_target is None):
        missing = "test_inputs" if test_inputs is None else "test_target"
        raise ValueError(f"{missing}: expected test_inputs and test_target together, got None")
    check_inputs("inputs", inputs)
    if test_inputs is not None:
        check_inputs("test_inputs", test_inputs)
        check_inputs("test_target", test_target)
    check_target(target, inputs, -100, "inputs")
    if len(inputs) == 0:
        raise ValueError("inputs: expected at least one sample, got none")
    if (target == -100).any():
        raise ValueError("target: expected a class for every sample, got -100; leave these out")
    if test_inputs is not None:
        check_target(test_target, test_inputs, -100, "test_inputs", "test_target")
