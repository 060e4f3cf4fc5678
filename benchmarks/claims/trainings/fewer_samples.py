"""Trainings that go on with a few samples after all samples are separated.

A run trains on all samples until their error is 0. From this state it goes on several times: with
all samples, and with M samples of different choices. Other trainings on M samples begin anew.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness.data import Data, Sources, load
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD

from marginops import classification_margin, select_classification_margin
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

    ``separated_after`` is a number of updates, or None, and then nothing else is there. ``cut`` has
    what follows at separation, and ``later`` what follows after more updates with all samples.
    ``closest`` has the samples with the smallest margins at separation, the smallest first, and
    ``closest_target`` their classes.
    """
    seed, count, target = settings["seed"], len(data.train_target), data.train_target
    network, optimizer = build(data, settings)
    separated_after = train_until_separated(network, optimizer, data, seed)
    if separated_after is None:
        return {"separated_after": None}
    logits = logits_of(network, data.train_inputs)
    closest = select_classification_margin(logits, target, number(SHARES[-1], count)).indices
    cut = go_on(network, optimizer, data, settings, SHARES, CHOICES)
    for share, choice in itertools.product(SHARES, CHOICES[:2]):
        sampler = reduction(logits, target, number(share, count), choice, seed)
        found = begin_anew(data, settings, batches_of(sampler))
        cut["reduced"].append({"share": share, "choice": choice, "way": ANEW} | found)
    train(network, optimizer, data, batches_of_all(data, seed, 1), settings["later"])
    return {
        "separated_after": separated_after,
        "cut": cut,
        "later": go_on(network, optimizer, data, settings, SHARES[1:2], CHOICES[:2]),
        "closest": closest.tolist(),
        "closest_target": target[closest].tolist(),
    }


def go_on(
    network: nn.Module,
    optimizer: SGD,
    data: Data,
    settings: dict[str, Any],
    shares: Sequence[float],
    choices: Sequence[str],
) -> dict[str, Any]:
    """Go on from one state with all samples and with few; network and optimizer do not change."""
    seed, count, target = settings["seed"], len(data.train_target), data.train_target
    logits = logits_of(network, data.train_inputs)

    def trained(batches: Iterator[Tensor], weight: float = 1) -> dict[str, float]:
        own_network, own_optimizer = copy.deepcopy((network, optimizer))
        keep_statistics(own_network)
        train(own_network, own_optimizer, data, batches, settings["updates"], weight)
        return scores(own_network, data)

    reduced = []
    for share, choice in itertools.product(shares, choices):
        kept = number(share, count)
        for way, weight in ((MEAN, 1), (SUM, kept / count)):
            sampler = reduction(logits, target, kept, choice, seed)
            found = trained(batches_of(sampler), weight)
            reduced.append({"share": share, "choice": choice, "way": way} | found)
    return {
        "start": scores(network, data),
        "all": trained(batches_of_all(data, seed, 2)),
        "reduced": reduced,
    }


def begin_anew(data: Data, settings: dict[str, Any], batches: Iterator[Tensor]) -> dict[str, float]:
    """Train from the first weights, in the second half with the second learning rate."""
    network, optimizer = build(data, settings)
    first = settings["updates"] // 2
    train(network, optimizer, data, batches, first)
    set_rate(optimizer, LEARNING_RATES[1])
    train(network, optimizer, data, batches, settings["updates"] - first)
    return scores(network, data)


def number(share: float, count: int) -> int:
    """How many samples a share of them is, at least the two that a batch norm needs."""
    return max(2, round(share * count))


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
    batches = batches_of_all(data, seed, 0)
    updates = max(1, count // BATCH_SIZE)
    for epoch in range(MOST_EPOCHS):
        if epoch == EPOCHS_OF_FIRST_RATE:
            set_rate(optimizer, LEARNING_RATES[1])
        train(network, optimizer, data, batches, updates, dynamics=dynamics)
        if (dynamics.margin > 0).double().mean() >= ALMOST_SEPARATED:
            logits = logits_of(network, data.train_inputs)
            if (classification_margin(logits, data.train_target) > 0).all():
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
    """The sampler of the kept samples. Its margins are those of one network, not of an epoch."""
    count = len(target)
    dynamics = TrainingDynamics(num_samples=count)
    dynamics.update(torch.arange(count), logits, target)
    sampler = ReductionSampler(
        dynamics, kept, choice=choice, num_samples=count // kept * kept, seed=seed
    )
    sampler.set_epoch(0)
    return sampler


def batches_of(sampler: ReductionSampler) -> Iterator[Tensor]:
    """Batches of the kept samples without end: all of them, if they fit into one batch."""
    batch_size = min(sampler.num_kept, BATCH_SIZE)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from full_batches(torch.tensor(list(sampler)), batch_size)


def batches_of_all(data: Data, seed: int, part: int) -> Iterator[Tensor]:
    """Batches of all samples without end, in another order in each part of a run."""
    return uniform_batches(len(data.train_target), BATCH_SIZE, 10 * seed + part)


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
