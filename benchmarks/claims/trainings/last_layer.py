"""Runs of the claim that gradient flow maximises the margin in a norm of a few parameters only."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness.data import Data, Sources, load
from torch import Tensor, nn

import marginops
from marginops import homogeneity
from marginops.metrics import NeuralCollapse
from trainings.product_flow import Products, run_flow

RANDOM = "random inputs"
READINGS = ("tau", "lambda_max", "frobenius")
PROPERTIES = ("nc1", "nc2_norm_means", "nc2_angle_means", "nc3", "nc4")


def run(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """One run of the part that the settings name."""
    torch.manual_seed(settings["seed"])
    if settings["part"] == "rates":
        return run_rates(settings)
    if settings["part"] == "flow":
        return run_flow(settings, sources)
    return run_collapse(settings, sources)


class Block(nn.Module):
    """Two convolutions with batch norms, and the sum with their input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The output of the block."""
        return F.relu(self.branch(x) + self.shortcut(x))


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for colour images and ten classes; its original has a width of 64."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A linear layer, a residual branch without normalisation, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)
        self.branch = nn.Sequential(
            nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        hidden = self.first(x)
        return self.last(hidden + self.branch(hidden))


def classifier(inputs: int, width: int, norm: str) -> nn.Sequential:
    """Two hidden layers of ReLU with biases, ten classes, and a normalisation before the last.

    The normalisation has no parameters. So networks of one seed start with equal parameters.
    """
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU()]
    layers += [nn.Linear(width, width), nn.ReLU()]
    if norm == "batch":
        layers.append(nn.BatchNorm1d(width, affine=False, track_running_stats=False))
    elif norm == "layer":
        layers.append(nn.LayerNorm(width, elementwise_affine=False))
    return nn.Sequential(*layers, nn.Linear(width, 10))


def rated_network(name: str, width: int) -> tuple[nn.Module, Tensor]:
    """A network by its name, and inputs for it."""
    if name == "ResNet-18":
        return resnet18(width), torch.randn(4, 3, 32, 32)
    networks = {
        "ReLU network with biases": lambda: classifier(8, 8, "none"),
        "ReLU network with layer norm": lambda: classifier(8, 8, "layer"),
        "residual branch without norm": Residual,
        "t1 x1 + t2 t3 x2": lambda: Products(1, 1),
    }
    network = networks[name]()
    return network, torch.randn(4, 2 if isinstance(network, Products) else 8)


@torch.no_grad()
def run_rates(settings: dict[str, Any]) -> dict[str, Any]:
    """The rates of a network, and how far its output is from growing by e at these rates."""
    network, inputs = rated_network(settings["network"], settings["width"])
    network, inputs = network.double(), inputs.double()
    network(inputs)  # the batch norms get statistics that are not 0 and 1
    network.eval()
    rates = homogeneity.rates(network, inputs)
    before = network(inputs)
    homogeneity.rescale(network, rates, 1.0)
    grown = network(inputs) / math.e
    return {
        "rates": rates,
        "numbers": sum(parameter.numel() for parameter in network.parameters()),
        "scaling_error": ((grown - before).norm() / before.norm()).item(),
    }


def balanced(data: Data, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same number of training samples of every class, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train_target), generator=generator)
    target = data.train_target[order]
    chosen = torch.cat([order[target == label][:each] for label in range(data.num_classes)])
    return data.train_inputs[chosen], data.train_target[chosen]


def log_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The logarithm of the mean cross-entropy, also where the cross-entropy underflows."""
    others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    gap = (others - logits.gather(1, target[:, None]).squeeze(1)).double()
    logs = torch.where(gap < -36, gap, F.softplus(gap.clamp(min=-36)).log())
    return logs.logsumexp(0) - math.log(len(target))


class Descent:
    """Full-batch steps down the logarithm of the loss.

    A step that would not decrease it is not done, and the next one is half as long. After every
    other step the next one is a tenth longer.
    """

    def __init__(self, network: nn.Module, inputs: Tensor, target: Tensor, step: float) -> None:
        self.network, self.inputs, self.target, self.step = network, inputs, target, step
        self.parameters = list(network.parameters())
        self.logits = network(inputs)
        self.loss = log_loss(self.logits, target)
        self.gradients = torch.autograd.grad(self.loss, self.parameters)

    def advance(self) -> bool:
        """Try a step, and return whether it was done."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.sub_(self.step * gradient)
        logits = self.network(self.inputs)
        loss = log_loss(logits, self.target)
        if not loss < self.loss:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)
            self.step /= 2
            return False
        self.logits, self.loss = logits, loss
        self.gradients = torch.autograd.grad(loss, self.parameters)
        self.step *= 1.1
        return True


def run_collapse(settings: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Train a network far past separation, and measure its margins and its neural collapse."""
    data = load(settings["data"], sources)
    inputs, target = balanced(data, settings["each"], settings["seed"])
    network = classifier(inputs[0].numel(), settings["width"], settings["norm"])
    rates = homogeneity.rates(network, inputs)
    descent = Descent(network, inputs, target, step=0.1)
    steps = settings["steps"]
    checkpoints = set(np.geomspace(10, steps, 30).astype(int).tolist())
    separated: dict[str, Any] = {}
    rising, compared, before = np.zeros(3, int), 0, None
    curve = []
    for step in range(1, steps + 1):
        descent.advance()
        is_separated = bool((descent.logits.argmax(1) == target).all())
        at_checkpoint = step in checkpoints
        if not (at_checkpoint or (is_separated and (step % 10 == 0 or not separated))):
            continue
        margins = smallest_margins(network, descent.logits.detach(), target, rates)
        if is_separated and not separated:
            separated = {"step": step, "margins": margins}
        if is_separated and step % 10 == 0:
            if before is not None:
                rising += np.array(margins) > before
                compared += 1
            before = np.array(margins)
        if at_checkpoint:
            collapse = neural_collapse(network, inputs, target)
            row = [step, descent.loss.item(), *margins, *collapse]
            curve.append([float(f"{value:.4g}") for value in row])
    return {
        "separated": separated,
        "end": {"log_loss": descent.loss.item(), "margins": margins, "collapse": collapse},
        "rising": (rising / max(compared, 1)).round(4).tolist(),
        "compared": compared,
        "curve": curve,
    }


@torch.no_grad()
def smallest_margins(
    network: nn.Module, logits: Tensor, target: Tensor, rates: dict[str, float]
) -> list[float]:
    """The smallest margin, normalised as the readings say.

    The Frobenius norm takes all parameters, biases as well, and its power is the number of layers
    that follow the last normalisation.
    """
    smallest = marginops.classification_margin(logits, target).min().double()
    found = [
        (smallest * (-homogeneity.log_scale(network, rates, version=version)).exp()).item()
        for version in READINGS[:2]
    ]
    squares = sum(parameter.double().square().sum() for parameter in network.parameters())
    layers = sum(rate > 0 for name, rate in rates.items() if name.endswith("weight"))
    return [*found, (smallest / squares ** (layers / 2)).item()]


@torch.no_grad()
def neural_collapse(network: nn.Sequential, inputs: Tensor, target: Tensor) -> list[float]:
    """The properties of neural collapse of the inputs of the last layer."""
    features = network[:-1](inputs)
    metric = NeuralCollapse(10, features.shape[1], two_passes=True)
    metric.update(features, target, network[-1].weight)
    metric.update_nearest(features, network[-1](features), target)
    summary = metric.compute()
    return [getattr(summary, name).item() for name in PROPERTIES]
