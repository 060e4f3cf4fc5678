"""Train at a budget with a sampling that visits some samples more often, and time the training."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from harness.data import Data, Sources, load_part
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from marginops.training import (
    BelowMeanLoss,
    MarginSampler,
    SmallestMargins,
    Stopwatch,
    TrainingDynamics,
)

from .loop import error_of, full_batches, uniform_batches, warm_up_and_cosine
from .networks import convolutions, perceptron

UNIFORM, STALE, INFO_BATCH = "uniform", "stale margins", "InfoBatch"
LOSS, EL2N, SUBSET = "largest losses", "largest EL2N", "random subset"
SAMPLINGS = (UNIFORM, STALE, INFO_BATCH, LOSS, EL2N, SUBSET)
PERCEPTRON, CONVOLUTIONS, RESIDUAL = "perceptron", "convolutions", "residual network"
BATCH = 128
SHIFT = 2
# The share of the epochs at the end of InfoBatch that draw from all samples alike.
ANNEAL = 0.125


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Train a new network at a budget, and take its accuracy after the last update.

    ``settings["evaluate_on"]`` is ``"test"``, or ``"held-out"`` to choose a learning rate: then a
    sixth of the training samples is held out of training and takes the place of the test set.
    """
    data = load_part(settings["data"], sources, settings["evaluate_on"])
    # The first updates of a process are slow, so they are not measured.
    few = slice(4 * BATCH)
    first = Data(data.train_inputs[few], data.train_target[few], data.test_inputs, data.test_target)
    train(new_network(settings["network"], data), first, settings | {"budget": 4})
    torch.manual_seed(settings["seed"])
    network = new_network(settings["network"], data)
    stopwatch = Stopwatch()
    with stopwatch:
        samples = train(network, data, settings)
    return {
        "accuracy": 1 - error_of(network, data.test_inputs, data.test_target),
        "samples": samples,
        "process_seconds": round(stopwatch.process_seconds, 4),
        "wall_seconds": round(stopwatch.wall_seconds, 4),
    }


def new_network(name: str, data: Data) -> nn.Module:
    """A network for a data set; those with convolutions are for images of 28 x 28 pixels."""
    if name == PERCEPTRON:
        return perceptron(data.train_inputs[0].numel(), [256], data.num_classes)
    return (residual_network if name == RESIDUAL else convolutions)(data.num_classes)


class Block(nn.Module):
    """Two convolutions with batch normalization beside a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """The ReLU of the sum of both branches."""
        return torch.relu(self.layers(inputs) + self.shortcut(inputs))


def residual_network(classes: int) -> nn.Module:
    """A stem with stride 4 and two blocks, of 8 and 16 channels."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 5, 4, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )
    # Few channels are faster this way on a processor.
    return network.to(memory_format=torch.channels_last)


def train(network: nn.Module, data: Data, settings: dict[str, Any]) -> int:
    """Stochastic gradient descent whose learning rate falls to 0 at its last update.

    ``settings["budget"]`` is the number of samples that are back-propagated, in sizes of the
    training set.

    Returns:
        The number of samples.
    """
    steps = max(1, round(settings["budget"] * len(data.train_target) / BATCH))
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=settings["learning_rate"],
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_up_and_cosine(step, steps)
    )
    generator = torch.Generator().manual_seed(settings["seed"])
    sampler = None
    if settings["sampling"] not in (UNIFORM, SUBSET):
        sampler = new_sampler(len(data.train_target), settings)
    for indices in islice(batches(len(data.train_target), settings, sampler), steps):
        target = data.train_target[indices]
        inputs = data.train_inputs[indices]
        if settings["network"] == RESIDUAL:
            inputs = augmented(inputs, generator)
        logits = network(inputs)
        if sampler is None:
            loss = cross_entropy(logits, target)
        else:
            loss = recorded_loss(sampler, settings["sampling"], indices, logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return BATCH * steps


def new_sampler(size: int, settings: dict[str, Any]) -> MarginSampler:
    """The sampler of a scheme that goes by what the training saw of each sample."""
    dynamics, keep, seed = TrainingDynamics(size), settings["keep"], settings["seed"]
    if settings["sampling"] == INFO_BATCH:
        epochs = math.ceil(settings["budget"] / keep)
        return MarginSampler(
            dynamics, BelowMeanLoss(keep), num_epochs=epochs, anneal=ANNEAL, seed=seed
        )
    by = {STALE: "margin", LOSS: "loss", EL2N: "el2n"}[settings["sampling"]]
    return MarginSampler(dynamics, SmallestMargins(keep, by=by), seed=seed)


def batches(size: int, settings: dict[str, Any], sampler: MarginSampler | None) -> Iterator[Tensor]:
    """Indices of batches without end."""
    if sampler is not None:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from full_batches(sampler.indices(), BATCH)
            epoch += 1
    elif settings["sampling"] == UNIFORM:
        yield from uniform_batches(size, BATCH, settings["seed"])
    else:
        generator = torch.Generator().manual_seed(1000 + settings["seed"])
        kept = torch.randperm(size, generator=generator)[: round(settings["keep"] * size)]
        for rows in uniform_batches(len(kept), BATCH, settings["seed"]):
            yield kept[rows]


def recorded_loss(
    sampler: MarginSampler, sampling: str, indices: Tensor, logits: Tensor, target: Tensor
) -> Tensor:
    """The mean loss of a batch, of which the dynamics take note.

    InfoBatch weights the losses, so that the mean estimates that of all samples. It does so as soon
    as an epoch visits no samples for the first time.
    """
    statistics = sampler.dynamics.update(indices, logits, target)
    if sampling == INFO_BATCH and sampler.unbiased:
        weights = sampler.loss_weights(indices) * (sampler.epoch_size / sampler.population)
        return (weights * statistics.loss).mean()
    return statistics.mean_loss()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[B, 1, H, W]``, half of them mirrored, each shifted by up to two pixels.

    What a shift uncovers are copies of the pixels at the edge.
    """
    count, _, height, width = images.shape
    places = torch.randint(2 * SHIFT + 1, (2, count), generator=generator)
    is_mirrored = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    padded = pad(images, [SHIFT] * 4, mode="replicate")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    shifted = windows[torch.arange(count), :, places[0], places[1]]
    return torch.where(is_mirrored, shifted.flip(-1), shifted)
