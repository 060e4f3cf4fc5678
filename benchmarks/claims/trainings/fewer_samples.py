"""Trainings that go on with a few samples after all samples are separated.

A run trains on all samples until their error is 0. From this state it goes on several times: with
all samples, and with M samples of different choices. Other trainings on M samples begin anew.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from harness.data import Data, Sources, load
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from marginops import select_classification_margin
from marginops.norms import log_norm_product
from marginops.training import ReductionSampler, TrainingDynamics

from .loop import error_of, full_batches, logits_of, uniform_batches

SHARES = (0.002, 0.005, 0.01)
CHOICES = ("smallest", "random", "largest")
# After separation the loss is the mean of the kept samples, or their part in the mean of all N:
# their sum divided by N. "new" is a training from the first weights on the kept samples alone.
MEAN, SUM, ANEW = "mean", "sum", "new"
HIDDEN = (256, 128)
BATCH_SIZE = 128
# The second rate begins after the epochs of the first, and goes on after separation.
LEARNING_RATES = (0.05, 0.01)
EPOCHS_OF_FIRST_RATE = 25
MOST_EPOCHS = 150
# Only exact margins tell whether all samples are separated. They are not computed before.
ALMOST_SEPARATED = 0.99


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Train until separation and go on in every way; accuracies are in per cent."""
    data = load(settings["data"], sources)
    count = settings["samples"]
    return measure(
        Data(
            data.train_inputs[:count].flatten(1),
            data.train_target[:count],
            data.test_inputs.flatten(1),
            data.test_target,
        ),
        settings,
    )


def measure(data: Data, settings: dict[str, Any]) -> dict[str, Any]:
    """What :func:`run` returns, for data that are loaded.

    ``separated_after`` is a number of updates, or None, and then nothing else is there. ``closest``
    has the samples with the smallest margins at separation, the smallest first.
    """
    seed, updates = settings["seed"], settings["updates"]
    count, target = len(data.train_target), data.train_target
    network, optimizer = build(data, settings)
    separated_after = train_until_separated(network, optimizer, data, seed)
    if separated_after is None:
        return {"separated_after": None}
    logits = logits_of(network, data.train_inputs)

    def gone_on(batches: Iterator[Tensor], weight: float = 1) -> dict[str, float]:
        own_network, own_optimizer = copy.deepcopy((network, optimizer))
        keep_statistics(own_network)
        train(own_network, own_optimizer, data, batches, updates, weight)
        return scores(own_network, data)

    def begun_anew(batches: Iterator[Tensor]) -> dict[str, float]:
        own_network, own_optimizer = build(data, settings)
        train(own_network, own_optimizer, data, batches, updates // 2)
        set_rate(own_optimizer, LEARNING_RATES[1])
        train(own_network, own_optimizer, data, batches, updates - updates // 2)
        return scores(own_network, data)

    reduced = []
    for share, choice in itertools.product(SHARES, CHOICES):
        kept = number(share, count)

        def batches(kept: int = kept, choice: Any = choice) -> Iterator[Tensor]:
            return batches_of(reduction(logits, target, kept, choice, seed))

        common = {"share": share, "choice": choice}
        reduced.append(common | {"way": MEAN} | gone_on(batches()))
        reduced.append(common | {"way": SUM} | gone_on(batches(), kept / count))
        if choice != "largest":
            reduced.append(common | {"way": ANEW} | begun_anew(batches()))
    most = number(SHARES[-1], count)
    return {
        "separated_after": separated_after,
        "separated": scores(network, data),
        "all": gone_on(uniform_batches(count, BATCH_SIZE, seed + 1_000_000)),
        "reduced": reduced,
        "closest": select_classification_margin(logits, target, k=most).indices.tolist(),
    }


def number(share: float, count: int) -> int:
    """How many samples a share of them is, at least one."""
    return max(1, round(share * count))


def build(data: Data, settings: dict[str, Any]) -> tuple[nn.Sequential, SGD]:
    """A perceptron with its first weights, which depend on the seed alone, and its optimizer."""
    torch.manual_seed(settings["seed"])
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise((data.train_inputs.shape[1], *HIDDEN)):
        layers.append(nn.Linear(width, following))
        layers += [nn.BatchNorm1d(following)] if settings["batch_norm"] else []
        layers.append(nn.ReLU())
    network = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], data.num_classes))
    optimizer = SGD(
        network.parameters(),
        LEARNING_RATES[0],
        momentum=0.9,
        weight_decay=settings["weight_decay"],
    )
    return network, optimizer


def train_until_separated(network: nn.Module, optimizer: SGD, data: Data, seed: int) -> int | None:
    """Train on all samples until all margins of one network are positive; the number of updates."""
    count = len(data.train_target)
    dynamics = TrainingDynamics(num_samples=count)
    batches = uniform_batches(count, BATCH_SIZE, seed)
    updates = max(1, count // BATCH_SIZE)
    for epoch in range(MOST_EPOCHS):
        if epoch == EPOCHS_OF_FIRST_RATE:
            set_rate(optimizer, LEARNING_RATES[1])
        train(network, optimizer, data, batches, updates, dynamics=dynamics)
        if (dynamics.margin > 0).double().mean() >= ALMOST_SEPARATED and (
            error_of(network, data.train_inputs, data.train_target) == 0
        ):
            return (epoch + 1) * updates
    return None


def train(
    network: nn.Module,
    optimizer: SGD,
    data: Data,
    batches: Iterator[Tensor],
    updates: int,
    weight: float = 1,
    dynamics: TrainingDynamics | None = None,
) -> None:
    """Train on the next batches, by the mean loss of a batch times the weight."""
    for indices in itertools.islice(batches, updates):
        logits = network(data.train_inputs[indices])
        target = data.train_target[indices]
        optimizer.zero_grad()
        (weight * functional.cross_entropy(logits, target)).backward()
        optimizer.step()
        if dynamics is not None:
            dynamics.update(indices, logits.detach(), target)


def reduction(
    logits: Tensor, target: Tensor, kept: int, choice: Any, seed: int
) -> ReductionSampler:
    """The sampler of the kept samples, whose margins are exact: those of one network."""
    count = len(target)
    dynamics = TrainingDynamics(num_samples=count)
    dynamics.update(torch.arange(count), logits, target)
    sampler = ReductionSampler(dynamics, kept, choice=choice, shrink=True, seed=seed)
    sampler.set_epoch(0)
    return sampler


def batches_of(sampler: ReductionSampler) -> Iterator[Tensor]:
    """Batches of the kept samples without end: all of them, if they fit into one batch."""
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from full_batches(torch.tensor(list(sampler)), BATCH_SIZE)


def keep_statistics(network: nn.Module) -> None:
    """Make batch norms normalise by the running statistics that they have, and keep these."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def set_rate(optimizer: SGD, rate: float) -> None:
    """Set the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def scores(network: nn.Module, data: Data) -> dict[str, float]:
    """Accuracies in per cent, and the mean of the smallest normalised margins, a hundredth."""
    logits, target = logits_of(network, data.train_inputs), data.train_target
    smallest = select_classification_margin(
        logits, target, number(0.01, len(target)), log_norm=log_norm_product(network)
    ).scores
    correct = (logits.argmax(1) == target).double().mean().item()
    return {
        "accuracy": round(100 * (1 - error_of(network, data.test_inputs, data.test_target)), 4),
        "training_accuracy": round(100 * correct, 4),
        "margin": float(f"{smallest.mean().item():.4g}"),
    }
