"""Small networks with the parity of the label as target, and their inversion points.

A run trains several networks on the same samples. They differ in their initial weights alone, so
the run can compare the sets of samples that they misclassify. It returns numbers and curves.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from harness.data import Data, Sources, load
from torch import Tensor, nn

import marginops
from marginops.training import InversionMonitor, straggler_stability

UNITS = 20
FIRST_EPOCH = 20
LEFT_OUT = -100  # the target of samples that a network is not trained on
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
}


class Networks(nn.Module):
    """Perceptrons side by side, each with one hidden layer of tanh units and two logits.

    The initial weights are those of ``torch.nn.Linear``, uniform up to one over the square root of
    the number of inputs. Each network has a seed of its own.
    """

    def __init__(self, inputs: int, seeds: list[int]) -> None:
        super().__init__()
        self.size = len(seeds)
        shapes = {
            "hidden_weight": (UNITS, inputs),
            "hidden_bias": (UNITS,),
            "weight": (UNITS, 2),
            "bias": (1, 2),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(self.size, *shape)))
        for index, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name in shapes:
                bound = (inputs if name.startswith("hidden") else UNITS) ** -0.5
                values = self.get_parameter(name).data[index]
                values.uniform_(-bound, bound, generator=generator)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The features ``[S, N, 20]`` and the logits ``[S, N, 2]`` of S networks."""
        hidden = F.linear(inputs, self.hidden_weight.flatten(0, 1), self.hidden_bias.flatten())
        features = hidden.tanh().unflatten(1, (self.size, UNITS)).transpose(0, 1)
        return features, torch.baddbmm(self.bias, features, self.weight)


class Training:
    """What was seen of S networks while they were trained.

    Attributes:
        monitors: The inversion monitor of every network.
        misclassified: ``[S, P]``, the misclassified samples, after every epoch of the curves.
        test_error: ``[S]``, the share of misclassified test samples at the end.
    """

    def __init__(self, settings: dict[str, Any], seeds: list[int], data: Data, targets: Tensor):
        self.monitors = [
            InversionMonitor(2, first_epoch=FIRST_EPOCH, per_class=False) for _ in seeds
        ]
        self.misclassified: dict[int, Tensor] = {}
        networks = Networks(data.train_inputs.shape[1], seeds)
        optimizer_type, arguments = OPTIMIZERS[settings["optimizer"]]
        optimizer = optimizer_type(networks.parameters(), lr=settings["learning_rate"], **arguments)
        epochs = settings["epochs"]
        states = after_epochs(networks, optimizer, data.train_inputs, targets, epochs)
        for epoch, (features, logits) in enumerate(states, 1):
            self.see(epoch, features, logits, targets, epoch in curve_epochs(epochs))
        with torch.no_grad():
            predicted = networks(data.test_inputs)[1].argmax(2)
        self.test_error = (predicted != data.test_target).double().mean(1)

    def see(
        self, epoch: int, features: Tensor, logits: Tensor, targets: Tensor, keep: bool
    ) -> None:
        """Tell the monitors of an epoch, and keep what is misclassified if asked to."""
        wrong = (logits.argmax(2) != targets) & (targets != LEFT_OUT)
        for index, monitor in enumerate(self.monitors):
            moments = marginops.class_moments(
                features[index], targets[index], 2, normalize=True, ignore_index=LEFT_OUT
            )
            monitor.update(moments.radius, wrong[index])
        if keep:
            self.misclassified[epoch] = wrong


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Train networks with all samples, then some of them again without their stragglers.

    Args:
        settings: ``data``, ``seed`` (which draws the samples), ``samples``, ``networks`` >= 3,
            ``optimizer``, ``learning_rate``, ``epochs``, and ``again``: how many networks are
            trained two more times, without their stragglers and without as many random samples.
        sources: Where the data sets are.

    Returns:
        Lists over networks, and curves over the epochs ``at``.
    """
    data = drawn(settings, sources)
    count, seed, target = settings["networks"], settings["seed"], data.train_target
    seeds = [1000 * seed + index for index in range(count)]
    everything = Training(settings, seeds, data, target.expand(count, -1))
    result = {
        "at": curve_epochs(settings["epochs"]),
        **of_networks(everything),
        **of_pairs(everything, len(target)),
    }
    again = [i for i in range(settings["again"]) if everything.monitors[i].inverted]
    if again:
        result["trained_again"] = again
        stragglers = torch.stack([everything.monitors[i].stragglers for i in again])
        sets = {"without_stragglers": stragglers, "without_random": as_many(stragglers, seed)}
        for name, left_out in sets.items():
            targets = target.where(~left_out, LEFT_OUT)
            training = Training(settings, [seeds[i] for i in again], data, targets)
            result |= {f"{name}_{key}": value for key, value in of_networks(training).items()}
    return result


def drawn(settings: dict[str, Any], sources: Sources) -> Data:
    """Random training samples and all test samples; the target is the parity of the label.

    Every pixel is standardised by its mean and standard deviation over the drawn samples.
    """
    data = load(settings["data"], sources)
    generator = torch.Generator().manual_seed(settings["seed"])
    order = torch.randperm(len(data.train_target), generator=generator)[: settings["samples"]]
    inputs = data.train_inputs[order].flatten(1)
    deviation, mean = torch.std_mean(inputs, dim=0, correction=0)
    deviation = torch.where(deviation == 0, 1, deviation)
    return Data(
        (inputs - mean) / deviation,
        data.train_target[order] % 2,
        (data.test_inputs.flatten(1) - mean) / deviation,
        data.test_target % 2,
    )


def curve_epochs(epochs: int) -> list[int]:
    """The epochs of the curves, each about 15 % later than the one before, and the last."""
    found = {epochs}
    epoch = 1.0
    while epoch < epochs:
        found.add(round(epoch))
        epoch *= 1.15 if epoch >= FIRST_EPOCH else 1.4
    return sorted(found)


def after_epochs(
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    epochs: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Train with one step an epoch, and yield the features and the logits after every step."""
    kept = (targets != LEFT_OUT).sum(1, keepdim=True)
    for epoch in range(epochs + 1):
        features, logits = networks(inputs)
        if epoch > 0:
            yield features.detach(), logits.detach()
        if epoch == epochs:
            return
        losses = F.cross_entropy(logits.mT, targets, ignore_index=LEFT_OUT, reduction="none")
        optimizer.zero_grad()
        (losses / kept).sum().backward()
        optimizer.step()


def as_many(sets: Tensor, seed: int) -> Tensor:
    """Random sets of the same sizes, as masks."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(sets.shape, generator=generator).argsort(1).argsort(1)
    return ranks < sets.sum(1, keepdim=True)


def of_networks(training: Training) -> dict[str, Any]:
    """What a training tells of every network, and the mean radius of class 0."""
    radius = torch.stack([monitor.history[:, 0] for monitor in training.monitors])
    rises = radius[:, FIRST_EPOCH - 1 :] >= radius[:, FIRST_EPOCH - 2 : -1]
    sets = [monitor.stragglers for monitor in training.monitors]
    return {
        "inversion": [monitor.epoch for monitor in training.monitors],
        "stragglers": [None if members is None else int(members.sum()) for members in sets],
        "rising": [round(share, 4) for share in rises.double().mean(1).tolist()],
        "test_error": [round(error, 5) for error in training.test_error.tolist()],
        "radius": [
            round(radius[:, epoch - 1].mean().item(), 3) for epoch in training.misclassified
        ],
    }


def of_pairs(training: Training, population: int) -> dict[str, Any]:
    """How alike the networks are: their stragglers, and what they misclassify at equal epochs."""
    result: dict[str, Any] = {}
    inverted = [monitor.stragglers for monitor in training.monitors if monitor.inverted]
    if len(inverted) > 1:
        result["jaccard"] = round(jaccard(*pairs(torch.stack(inverted))).mean().item(), 4)
    errors = torch.stack([wrong.double().mean(1) for wrong in training.misclassified.values()])
    result["error"] = [round(value, 5) for value in errors.mean(1).tolist()]
    result["error_sd"] = [round(value, 5) for value in errors.std(1).tolist()]
    result["stability"], result["overlap"] = [], []
    for wrong in training.misclassified.values():
        first, second = pairs(wrong)
        stability = straggler_stability(list(first), list(second), population)
        # JSON has no infinity, which is z where all pairs have equally many samples in common.
        result["stability"].append(round(stability, 1) if math.isfinite(stability) else None)
        result["overlap"].append(round(jaccard(first, second).mean().item(), 3))
    return result


def pairs(sets: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second set of all pairs of sets."""
    first, second = torch.triu_indices(len(sets), len(sets), 1)
    return sets[first], sets[second]


def jaccard(first: Tensor, second: Tensor) -> Tensor:
    """How many members two sets share, as a share of the members of either."""
    return (first & second).sum(1) / (first | second).sum(1).clamp(min=1).double()
