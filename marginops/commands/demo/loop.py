"""The training loop of ``marginops demo``, with each of the samplings that it compares."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks as checks
from ...networks import call, last_linear, output_tensor, predict
from ...ops.margin import classification_margin
from ...training import (
    MarginSampler,
    SmallestMargins,
    TrainingDynamics,
    mislabelled_share,
    select_batch,
)
from ..data import ClassificationData

Sampling = Literal["uniform", "minimal_margin", "stale_margin"]


@dataclass(frozen=True, eq=False)
class TrainingHistory:
    """The settings and results of a training run.

    Attributes:
        sampling: How the batches were chosen.
        updates: The numbers of updates after which the network was evaluated, from 0 on.
        seconds: The training time up to each evaluation. It includes drawing, scoring, selecting
            and updating, but no evaluation. On the CPU this is the time of all threads of the
            process, so other processes do not change it much. On a GPU it is the wall-clock time.
        test_accuracy: The share of correctly classified test samples at each evaluation.
        samples_trained: The number of back-propagated samples.
        samples_scored: The number of candidates that were scored for selection.
        margins_before: ``[N]``, classification margin of every training sample before training.
        margins_after: ``[N]``, classification margin of every training sample after training.
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
    dynamics: TrainingDynamics | None = None,
    skip_mislabelled: bool = False,
) -> TrainingHistory:
    """Train with cross-entropy on batches that one of three samplings chooses.

    - ``"uniform"``: each update draws ``batch_size`` samples.
    - ``"minimal_margin"``: each update draws ``candidate_ratio * batch_size`` candidates, and
      :func:`marginops.training.select_batch` selects the ``batch_size`` closest to a decision
      boundary. This is the scheme of Weinstein et al. (2020).
    - ``"stale_margin"``: a :class:`marginops.training.MarginSampler` draws the samples of each
      epoch, by the margins that the training saw last. Nothing else is scored.

    With the first two, an epoch of draws takes every sample at most once. With each, the samples at
    the end of an epoch that do not fill a draw are left out.

    Args:
        network: A network that maps inputs ``[B, ...]`` to logits ``[B, C]``. It is trained in
            place. Every module keeps its mode (training or evaluation).
        data: The data, on the device of ``network``.
        optimizer: An optimizer of the parameters of ``network``.
        updates: The number of optimizer steps.
        batch_size: The number of back-propagated samples per update.
        sampling: ``"uniform"``, ``"minimal_margin"`` or ``"stale_margin"``.
        candidate_ratio: The number of candidates per trained sample. Only ``"minimal_margin"`` uses
            it.
        head: The last layer, see :func:`marginops.training.select_batch`.
        scheduler: A scheduler that takes a step after every update. So it counts updates, not
            epochs.
        generator: The source of the draws. The default is the global generator.
        evaluate_every: The number of updates between two evaluations on the test data. The default
            is a fiftieth of ``updates``. The network is also evaluated before the first and after
            the last update.
        log_norm: A function that maps the network to a 0-d tensor, the ``log_norm`` of
            :func:`marginops.classification_margin` for the margins of the history. By default the
            margins are not normalised.
        on_update: A function that is called after every update with the number of updates so far.
        dynamics: What the training collects about every training sample. ``"stale_margin"`` makes
            its own if there is none. The others collect nothing then.
        skip_mislabelled: Whether ``"stale_margin"`` leaves out the samples that look mislabelled,
            see :func:`marginops.training.mislabelled_share`.

    Returns:
        The history. Its margins are on the CPU.

    Raises:
        ValueError: A number is out of range, ``sampling`` is unknown, or the last layer is not
            clear.

    The result, except for the seconds, is deterministic for a given network, state of
    ``generator`` and device, if the operations of the network are.

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
    if sampling == "stale_margin":
        if dynamics is None:
            dynamics = TrainingDynamics(len(target), device=target.device)
        draws = _draw_stale(dynamics, skip_mislabelled, updates, batch_size, generator)
    else:
        draws = _draw(len(target), count, generator, target.device)

    margins_before = _margins(network, data, log_norm)
    curve = [(0, 0.0, _test_accuracy(network, data))]
    seconds = 0.0
    started = _clock(target.device)
    for update in range(1, updates + 1):
        rows = next(draws)
        batch, labels = inputs[rows], target[rows]
        if selects:
            chosen = select_batch(network, batch, batch_size, head=head)
            rows, batch, labels = rows[chosen], batch[chosen], labels[chosen]
        logits = output_tensor(call(network, batch))
        if dynamics is None:
            loss = F.cross_entropy(logits, labels)
        else:
            loss = dynamics.update(rows, logits, labels).mean_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        if on_update is not None:
            on_update(update)
        if update % evaluate_every == 0 or update == updates:
            seconds += _clock(target.device) - started
            curve.append((update, seconds, _test_accuracy(network, data)))
            started = _clock(target.device)

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
    samples = len(data.train_target)
    draw = batch_size * candidate_ratio if sampling == "minimal_margin" else batch_size
    if draw > samples:
        raise ValueError(
            f"batch_size: expected at most {samples} draws per update, the number of training "
            f"samples, got {draw}; lower batch_size or candidate_ratio"
        )
    if sampling == "stale_margin" and batch_size > samples_an_epoch(samples):
        raise ValueError(
            f"batch_size: expected at most {samples_an_epoch(samples)}, the number of samples that "
            f"an epoch visits, got {batch_size}"
        )


def samples_an_epoch(samples: int) -> int:
    """How many of the training samples an epoch of stale margins visits."""
    return len(MarginSampler(TrainingDynamics(samples)))


def _draw(
    samples: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Iterator[Tensor]:
    """Yield ``count`` rows at a time, without end. An epoch draws every sample at most once."""
    source = "cpu" if generator is None else generator.device
    while True:
        order = torch.randperm(samples, generator=generator, device=source).to(device)
        yield from order[: samples - samples % count].split(count)


def _draw_stale(
    dynamics: TrainingDynamics,
    skip_mislabelled: bool,
    updates: int,
    batch_size: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Yield batches of the sampler's epochs, without end."""
    source = "cpu" if generator is None else generator.device
    seed = torch.randint(2**62, (), generator=generator, device=source).item()
    num_epochs = math.ceil(updates / (samples_an_epoch(dynamics.num_samples) // batch_size))
    policy = SmallestMargins(skip_hardest=mislabelled_share if skip_mislabelled else 0.0)
    sampler = MarginSampler(dynamics, policy, num_epochs=num_epochs, seed=int(seed))
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        order = sampler.indices().to(dynamics.device)
        yield from order[: len(order) - len(order) % batch_size].split(batch_size)


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


def _clock(device: torch.device) -> float:
    """Seconds of this process on the CPU, or of the wall clock after all work of a GPU is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()
