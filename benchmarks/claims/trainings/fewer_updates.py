"""Train on the samples of each step that a scheme chooses out of ten times as many candidates."""

from itertools import islice
from typing import Any

import torch
from harness.data import Data, Sources, load_part
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import marginops
from marginops.training import Stopwatch, select_batch

from .loop import error_of, logits_of, uniform_batches
from .networks import convolutions, perceptron

UNIFORM, MARGIN = "uniform", "minimal margin"
ENTROPY, LOSS = "largest entropy", "hard negatives of each class"
SAMPLINGS = (UNIFORM, MARGIN, ENTROPY, LOSS)
PERCEPTRON, CONVOLUTIONS = "perceptron", "convolutions"
BATCH, CANDIDATES = 64, 640
# The learning rate falls to a tenth after each of these shares of the updates.
DROPS = (0.5, 0.75)


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Train a new network for a number of updates, and take its accuracy after the last.

    ``settings["evaluate_on"]`` is ``"test"``, or ``"held-out"`` to choose a learning rate: then a
    sixth of the training samples is held out of training and takes the place of the test set.
    """
    data = load_part(settings["data"], sources, settings["evaluate_on"])
    options = {key: settings[key] for key in ("sampling", "updates", "learning_rate", "seed")}
    # The first updates of a process are slow, so they are not measured.
    train(new_network(settings["network"], data), data, **options | {"updates": 3})
    torch.manual_seed(settings["seed"])
    network = new_network(settings["network"], data)
    stopwatch = Stopwatch()
    with stopwatch:
        train(network, data, **options)
    return {
        "accuracy": 1 - error_of(network, data.test_inputs, data.test_target),
        "samples": BATCH * settings["updates"],
        "process_seconds": round(stopwatch.process_seconds, 4),
        "wall_seconds": round(stopwatch.wall_seconds, 4),
    }


def new_network(name: str, data: Data) -> nn.Module:
    """A network for the images of a data set. Digits are too small for the convolutions."""
    if name == CONVOLUTIONS:
        return convolutions(data.num_classes)
    return perceptron(data.train_inputs[0].numel(), [256], data.num_classes)


def train(
    network: nn.Module, data: Data, sampling: str, updates: int, learning_rate: float, seed: int
) -> None:
    """Stochastic gradient descent whose learning rate drops twice within its updates."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    milestones = [max(1, round(share * updates)) for share in DROPS]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    drawn = BATCH if sampling == UNIFORM else CANDIDATES
    for rows in islice(uniform_batches(len(data.train_target), drawn, seed), updates):
        inputs, target = data.train_inputs[rows], data.train_target[rows]
        if sampling != UNIFORM:
            chosen = choose(sampling, network, inputs, target)
            inputs, target = inputs[chosen], target[chosen]
        optimizer.zero_grad()
        cross_entropy(network(inputs), target).backward()
        optimizer.step()
        schedule.step()


def choose(sampling: str, network: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    """The candidates to train on. All are scored in evaluation mode and without gradient."""
    if sampling == MARGIN:
        return select_batch(network, inputs, k=BATCH)
    statistics = marginops.sample_statistics(logits_of(network, inputs), target)
    if sampling == ENTROPY:
        return marginops.select_smallest(-statistics.entropy, BATCH).indices
    return hardest_of_each_class(statistics.loss, target, BATCH)


def hardest_of_each_class(loss: Tensor, target: Tensor, k: int) -> Tensor:
    """The same number of each class with the largest loss; the largest others fill up to k."""
    order = marginops.select_smallest(-loss, len(loss)).indices
    classes = torch.nn.functional.one_hot(target[order])
    place_in_class = (classes.cumsum(0) * classes).sum(1) - 1
    is_other = place_in_class >= k // classes.shape[1]
    return order[torch.argsort(is_other, stable=True)[:k]]
