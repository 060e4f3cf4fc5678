"""Models whose norms the tests compute, and the dense matrices of layers."""

import torch
from torch import nn


class Function(nn.Module):
    """A function of this module, which has a layer, and of its input."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 3), function

    def forward(self, x):
        return self.function(self, x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        hidden = nn.functional.relu(self.bn1(self.conv1(x)))
        return nn.functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


def resnet18(width: int = 64, classes: int = 1000) -> nn.Module:
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    parts = [*stem, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for outputs in (width, 2 * width, 4 * width, 8 * width):
        parts += [Residual(inputs, outputs, 1 if outputs == width else 2)]
        parts += [Residual(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def with_statistics(model: nn.Module) -> nn.Module:
    """The model with batch norms as after training, where no number is 0 or 1."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


def dense(layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a linear map: a column for each entry of its input."""
    with torch.no_grad():
        columns = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).unflatten(1, shape)
        return (layer(columns) - layer(torch.zeros_like(columns))).flatten(1).T
