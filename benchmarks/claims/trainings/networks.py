"""Networks that several claims share."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def perceptron(inputs: int, hidden: Sequence[int], classes: int, *, bias: bool = True) -> nn.Module:
    """Linear layers with ReLU between them, from flattened inputs."""
    sizes = [inputs, *hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (width, following) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(width, following, bias=bias))
    return nn.Sequential(*layers)


def convolutions(classes: int = 10) -> nn.Module:
    """Two convolutions with stride 2 and a hidden layer of 64 units, for 28 x 28 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
