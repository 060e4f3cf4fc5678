"""A training loop that draws candidates uniformly and trains on some or all of them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks as checks
from ...networks import last_linear, predict
from ...ops.margin import classification_margin
from ...training.selection import select_batch
from ..data import ClassificationData

Sampling = Literal["uniform", "minimal_margin"]


@dataclass(frozen=True, eq=False)
class TrainingHistory:
    """What a training run did and what came of it.

    Attributes:
        sampling: How the batches were chosen.
        updates: The numbers of updates after which the network was evaluated, from 0 on.
        seconds: Training time up to each evaluation: drawing, scoring, selecting and updating,
            not evaluating.
        test_accuracy: Share of the test samples classified correctly at each evaluation.
        samples_trained: Samples back-propagated.
        samples_scored: Candidates scored for selection.
        margins_before: ``[N]``, classification margin of every training sample before training.
        margins_after: ``[N]``, the same after training.
    """

    sampling: Sampling
    updates: tuple[int, ...]
    seconds: tuple[float, ...]
    test_accuracy: tuple[float, ...]
    samples_trained: int
    samples_scored: int
    margins_before: Tensor
    margins_after: Tensor


def train(
    network: nn.Module,
    data: ClassificationData,
    optimizer: torch.optim.Optimizer,
    *,
    updates: int,
    batch_size: int,
    sampling: Sampling = "minimal_margin",
    candidate_ratio: int = 10,
    head: nn.Linear | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    generator: torch.Generator | None = None,
    evaluate_every: int | None = None,
    log_norm: Callable[[nn.Module], Tensor] | None = None,
    on_update: Callable[[int], None] | None = None,
) -> TrainingHistory:
    """Train on batches drawn uniformly, or selected by minimal margin from uniform candidates.

    With ``sampling="minimal_margin"`` each update draws ``candidate_ratio * batch_size``
    candidates, keeps the ``batch_size`` closest to a decision boundary (:func:`select_batch`)
    and takes a cross-entropy step on them: the scheme of Weinstein et al. (2020). With
    ``"uniform"`` each update draws ``batch_size`` samples and trains on all. Either way a sample
    is drawn once in an epoch of draws, and the rest of an epoch that does not fill another draw
    is left out.

    Args:
        network: Maps inputs ``[B, ...]`` to logits ``[B, C]``; trained in place, every module in
            the mode (training or evaluation) it is in.
        data: On the device of ``network``.
        optimizer: Over the parameters of ``network``.
        updates: Number of optimizer steps.
        batch_size: Samples back-propagated in each update.
        sampling: ``"minimal_margin"`` or ``"uniform"``.
        candidate_ratio: Candidates drawn per sample trained on; not used by ``"uniform"``.
        head: The last layer, see :func:`select_batch`.
        scheduler: Stepped once after every update, so schedules count updates, not epochs.
        generator: Source of the draws; the global one by default.
        evaluate_every: Updates between two evaluations on the test data; by default a fiftieth
            of ``updates``. The network is evaluated before the first and after the last, too.
        log_norm: Maps the network to the logarithm ``[]`` by which the margins of the history
            are normalised (:func:`marginops.classification_margin`); plain margins without.
        on_update: Called after every update with the number of updates so far.

    Returns:
        The history; its margins are on the CPU.

    Raises:
        ValueError: A number is out of range, ``sampling`` is unknown, or the head cannot be told.

    Deterministic for a given network, ``generator`` state and device, apart from the seconds, as
    far as the network's own operations are.

    Example:
        >>> import torch
        >>> from marginops.commands.data import load_digits
        >>> from marginops.commands.demo.loop import train
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> history = train(network, load_digits(), optimizer, updates=50, batch_size=16)
        >>> history.samples_trained, history.samples_scored
        (800, 8000)
    """
    _check(data, updates, batch_size, sampling, candidate_ratio, evaluate_every)
    selects = sampling == "minimal_margin"
    if selects and head is None:
        head = last_linear(network, data.num_classes)
    count = batch_size * candidate_ratio if selects else batch_size
    evaluate_every = evaluate_every or max(1, updates // 50)
    inputs, target = data.train_inputs, data.train_target
    draws = _draw(len(target), count, generator, target.device)

    margins_before = _margins(network, data, log_norm)
    curve = [(0, 0.0, _test_accuracy(network, data))]
    seconds = 0.0
    started = time.perf_counter()
    for update in range(1, updates + 1):
        rows = next(draws)
        batch, labels = inputs[rows], target[rows]
        if selects:
            chosen = select_batch(network, batch, batch_size, head=head)
            batch, labels = batch[chosen], labels[chosen]
        optimizer.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if on_update is not None:
            on_update(update)
        if update % evaluate_every == 0 or update == updates:
            _synchronize(target.device)
            seconds += time.perf_counter() - started
            curve.append((update, seconds, _test_accuracy(network, data)))
            started = time.perf_counter()

    evaluated, times, accuracies = zip(*curve, strict=True)
    return TrainingHistory(
        sampling=sampling,
        updates=evaluated,
        seconds=times,
        test_accuracy=accuracies,
        samples_trained=updates * batch_size,
        samples_scored=updates * count if selects else 0,
        margins_before=margins_before,
        margins_after=_margins(network, data, log_norm),
    )


def _check(
    data: ClassificationData,
    updates: int,
    batch_size: int,
    sampling: str,
    candidate_ratio: int,
    evaluate_every: int | None,
) -> None:
    checks.check_choice("sampling", sampling, get_args(Sampling))
    numbers = {"updates": updates, "batch_size": batch_size, "candidate_ratio": candidate_ratio}
    if evaluate_every is not None:
        numbers["evaluate_every"] = evaluate_every
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    draw = batch_size if sampling == "uniform" else batch_size * candidate_ratio
    if draw > len(data.train_target):
        raise ValueError(
            f"batch_size: each update would draw {draw} of {len(data.train_target)} training "
            "samples; lower batch_size or candidate_ratio"
        )


def _draw(
    samples: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Iterator[Tensor]:
    """``count`` rows at a time without end, every sample at most once in an epoch of draws."""
    source = "cpu" if generator is None else generator.device
    while True:
        order = torch.randperm(samples, generator=generator, device=source).to(device)
        yield from order[: samples - samples % count].split(count)


def _test_accuracy(network: nn.Module, data: ClassificationData) -> float:
    predicted = predict(network, data.test_inputs).argmax(1)
    return (predicted == data.test_target).double().mean().item()


def _margins(
    network: nn.Module, data: ClassificationData, log_norm: Callable[[nn.Module], Tensor] | None
) -> Tensor:
    logits = predict(network, data.train_inputs)
    with torch.no_grad():
        norm = None if log_norm is None else log_norm(network)
        return classification_margin(logits, data.train_target, log_norm=norm).cpu()


def _synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock counts work done and not work queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
