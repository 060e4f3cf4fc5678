"""Train with cross-entropy alone, or with the multi-margin regularization added to it."""

import time
from itertools import islice
from typing import Any

import torch
from harness.data import Data, Sources, load_part
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import marginops

from .loop import error_of, logits_of, uniform_batches, warm_up_and_cosine
from .networks import convolutions, perceptron

PERCEPTRON, CONVOLUTIONS = "perceptron", "convolutions"
BATCH, HIDDEN = 128, 64


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Train a network, and measure it.

    The weight of the regularization grows over the epochs to ``settings["coefficient"]``, and 0
    means cross-entropy alone. ``settings["samples"]`` training samples are drawn, or all are taken
    if it is None. ``settings["evaluate_on"]`` is ``"test"``, or ``"held-out"`` to choose settings:
    then a sixth of the training samples is held out of training and takes the place of the test
    set.

    Returns:
        ``test_error``, ``train_error``, ``train_loss`` (cross-entropy), ``margin`` (median of the
        test samples, see :func:`median_margin`) and ``step_seconds``, the CPU time of a step.
    """
    data = load_part(settings["data"], sources, settings["evaluate_on"])
    data = drawn(data, settings["samples"], settings["seed"])
    # The first steps of a process are slow, so they are not measured.
    train(new_network(settings["network"], data), data, settings, steps=3)
    torch.manual_seed(settings["seed"])
    network = new_network(settings["network"], data)
    steps = settings["epochs"] * steps_of_an_epoch(data)
    start = time.process_time()
    train(network, data, settings, steps)
    seconds = time.process_time() - start
    logits = logits_of(network, data.train_inputs)
    return {
        "test_error": error_of(network, data.test_inputs, data.test_target),
        "train_error": (logits.argmax(1) != data.train_target).double().mean().item(),
        "train_loss": float(f"{cross_entropy(logits, data.train_target).item():.6g}"),
        "margin": float(f"{median_margin(network, data.test_inputs, data.test_target):.6g}"),
        "step_seconds": float(f"{seconds / steps:.4g}"),
    }


def drawn(data: Data, samples: int | None, seed: int) -> Data:
    """Some training samples, which the seed chooses, with all test samples."""
    if samples is None:
        return data
    # Another seed than that of the batches, whose first order would be the same.
    generator = torch.Generator().manual_seed(10_000 + seed)
    chosen = torch.randperm(len(data.train_target), generator=generator)[:samples]
    inputs, target = data.train_inputs[chosen], data.train_target[chosen]
    return Data(inputs, target, data.test_inputs, data.test_target)


def new_network(name: str, data: Data) -> nn.Sequential:
    """A network whose last layer is linear, for 28 x 28 pixels or for any inputs."""
    if name == CONVOLUTIONS:
        network = convolutions(data.num_classes)
    else:
        network = perceptron(data.train_inputs[0].numel(), [HIDDEN], data.num_classes)
    assert isinstance(network, nn.Sequential)
    return network


def steps_of_an_epoch(data: Data) -> int:
    """The number of full batches, or 1."""
    return max(1, len(data.train_target) // BATCH)


def train(network: nn.Sequential, data: Data, settings: dict[str, Any], steps: int) -> None:
    """Stochastic gradient descent; the learning rate and the regularization have schedules."""
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings["learning_rate"],
        momentum=0.9,
        nesterov=True,
        weight_decay=settings["weight_decay"],
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_and_cosine(step, steps)
    )
    coefficient = settings["coefficient"]
    regularization = marginops.nn.MultiMarginRegularization(
        settings["epochs"], coefficient / 100, coefficient
    )
    batches = uniform_batches(len(data.train_target), BATCH, settings["seed"])
    for step, rows in enumerate(islice(batches, steps)):
        if step % steps_of_an_epoch(data) == 0:
            regularization.set_epoch(step // steps_of_an_epoch(data))
        optimizer.zero_grad()
        inputs, target = data.train_inputs[rows], data.train_target[rows]
        loss_of(network, inputs, target, regularization if coefficient else None).backward()
        optimizer.step()
        schedule.step()


def loss_of(
    network: nn.Sequential,
    inputs: Tensor,
    target: Tensor,
    regularization: marginops.nn.MultiMarginRegularization | None,
) -> Tensor:
    """The cross-entropy, and what the regularization adds to it."""
    last = network[-1]
    features = network[:-1](inputs)
    logits = last(features)
    loss = cross_entropy(logits, target)
    if regularization is not None:
        loss = loss + regularization(features, last.weight, target, logits)
    return loss


@torch.no_grad()
def median_margin(network: nn.Sequential, inputs: Tensor, target: Tensor) -> float:
    """The median signed distance of the features to the boundary between label and rival.

    It is a share of the largest norm of the features, so the scale of the features does not count.
    """
    features = logits_of(network[:-1], inputs)
    logits = network[-1](features)
    rival = logits.scatter(1, target.unsqueeze(1), -torch.inf).argmax(1)
    weight = network[-1].weight
    distance = (weight[target] - weight[rival]).norm(dim=1)
    margin = marginops.classification_margin(logits, target) / distance
    return (margin.median() / features.norm(dim=1).max()).item()
