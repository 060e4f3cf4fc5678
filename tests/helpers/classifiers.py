"""Small classifiers, ways to wrap them, and the batch that they should choose."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def network_with_state(device: str = "cpu") -> nn.Sequential:
    """A network with batch norm and dropout, which change state and draw numbers in training."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4)
    )
    return network.to(device)


class Pair(nn.Module):
    """A network with two inputs, as in text models, and logits as an attribute of its output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(left * right))


class BodyAndHead(nn.Module):
    """Two hidden layers and a head, called by ``function(network, inputs)``."""

    def __init__(self, function: Callable[["BodyAndHead", Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.head, self.function = nn.Linear(8, 4), function

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self, inputs)


def returning_logits(network: BodyAndHead, inputs: Tensor) -> Tensor:
    return network.head(network.body(inputs))


def returning_more(network: BodyAndHead, inputs: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=network.head(network.body(inputs)), loss=None)


def returning_mapping(network: BodyAndHead, inputs: Tensor) -> dict[str, Tensor]:
    return {"logits": network.head(network.body(inputs))}


def by_keyword(network: BodyAndHead, inputs: Tensor) -> Tensor:
    return network.head(input=network.body(inputs))


def modes(network: nn.Module) -> list[bool]:
    """Which modules are in training mode."""
    return [module.training for module in network.modules()]


def compiled(network: nn.Module) -> nn.Module:
    """A compiled network whose graph runs op by op: no code is generated."""
    return torch.compile(network, backend="eager")


def data_parallel(network: nn.Module) -> nn.DataParallel:
    """Move the network to the first GPU if there is one, because DataParallel requires it."""
    if not torch.cuda.is_available():
        return nn.DataParallel(network)
    return nn.DataParallel(network.to("cuda:0"), device_ids=[0])


@contextmanager
def group_of_one(folder: Path) -> Iterator[None]:
    """Make this process the only one of a group; DistributedDataParallel needs a group."""
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def expected_choice(logits: Tensor, weight: Tensor, k: int) -> Tensor:
    """The k rows with the smallest minimal margin, computed by its definition."""
    scores = []
    for row in logits.double():
        first, second = row.sort(descending=True, stable=True).indices[:2]
        distance = (weight[first] - weight[second]).double().norm()
        scores.append((row[first] - row[second]) / distance)
    return torch.stack(scores).sort(stable=True).indices[:k]
