"""The ``marginops observe`` command: margins, neural collapse and class manifolds in training."""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from . import command
from .nn import MultiMarginRegularization
from .training import ClassificationData, InversionMonitor

if TYPE_CHECKING:
    from .observer import EpochReport

_DEFAULTS = {
    # All of digits at once, and so without the noise of batches.
    "digits": {"epochs": 300, "batch_size": 1347, "hidden": (64, 64), "learning_rate": 0.1},
    "fashion-mnist": {"epochs": 40, "batch_size": 512, "hidden": (256, 256), "learning_rate": 0.05},
}
_LINES = 20


@dataclass
class Observation:
    """A training run: the network as it ended, and what was seen of it after every epoch."""

    network: nn.Sequential
    rates: dict[str, float]
    inversion: InversionMonitor
    reports: "list[EpochReport]" = field(default_factory=list)

    @property
    def inversions(self) -> list[int | None]:
        """For each class the epoch of its inversion."""
        epochs = self.inversion.epoch
        assert isinstance(epochs, list)
        return epochs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops observe`` to its parser."""
    command.add_data_arguments(parser, _DEFAULTS)
    command.add_count(parser, "--epochs", "passes over the training data", _DEFAULTS)
    command.add_count(parser, "--batch-size", "samples in each update", _DEFAULTS)
    command.add_run_arguments(
        parser,
        _DEFAULTS,
        learning_rate=f"of SGD with momentum {command.MOMENTUM}",
        output="marginops-observe.png",
        quiet="print no line for each epoch",
    )
    parser.add_argument(
        "--seed",
        type=command.seed,
        default=0,
        metavar="N",
        help="of network and batches (default: %(default)s)",
    )
    parser.add_argument(
        "--regularize", action="store_true", help="add multi-margin regularization to the loss"
    )


def run(arguments: argparse.Namespace) -> int:
    """Train, print what is seen and write the figure; return the exit status."""
    return command.execute("observe", _run, arguments)


def _run(arguments: argparse.Namespace) -> None:
    command.check_environment(arguments, ["matplotlib", "scipy", "torchmetrics"])
    options = command.with_defaults(arguments, _DEFAULTS)
    torch.set_num_threads(options.threads)
    data = command.load(options).to(options.device)

    from .observe_figure import draw
    from .observe_report import HEADER, conclusion, line, report

    samples, network = command.describe(data, options)
    if options.regularize:
        network += ", multi-margin regularization"
    print(f"{samples}; {network}, seed {options.seed}, device: {options.device}")
    if not options.quiet:
        print(f"\n{HEADER}")

    def show(epoch: int, seen: "EpochReport") -> None:
        step = math.ceil(options.epochs / _LINES)
        if not options.quiet and (epoch % step == 0 or epoch in (1, options.epochs)):
            print(line(epoch, seen), flush=True)

    observation = watch(data, options, show)
    print(f"\n{conclusion(observation)}\n")
    figure = draw(observation, f"{data.name}, {network}")
    command.write(options.output, lambda path: figure.savefig(path, dpi=90))
    if options.json is not None:
        text = json.dumps(report(observation, options), indent=2)
        command.write(options.json, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def watch(
    data: ClassificationData,
    options: argparse.Namespace,
    on_epoch: "Callable[[int, EpochReport], None]",
) -> Observation:
    """Train a network and look at it after every epoch."""
    from .homogeneity import rates
    from .observer import observe

    torch.manual_seed(options.seed)
    network = command.mlp(data, options.hidden).to(options.device)
    head = network[-1]
    assert isinstance(head, nn.Linear)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.learning_rate, momentum=command.MOMENTUM
    )
    regularization = MultiMarginRegularization(options.epochs).to(options.device)
    observation = Observation(
        network, rates(network, data.train_inputs[:2]), InversionMonitor(data.num_classes)
    )
    for epoch in range(options.epochs):
        regularization.set_epoch(epoch)
        for rows in torch.randperm(len(data.train_target)).split(options.batch_size):
            rows = rows.to(options.device)
            target = data.train_target[rows]
            features = network[:-1](data.train_inputs[rows])
            logits = head(features)
            loss = F.cross_entropy(logits, target)
            if options.regularize:
                loss = loss + regularization(features, head.weight, target, logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen = observe(network, data, head=head, rates=observation.rates)
        if not math.isfinite(seen.distribution.mean):
            raise command.UsageError(
                f"training diverged in epoch {epoch + 1}; lower --learning-rate"
            )
        observation.inversion.update(
            seen.manifolds.radius, seen.misclassified, data.train_target.cpu()
        )
        observation.reports.append(seen)
        on_epoch(epoch + 1, seen)
    return observation
