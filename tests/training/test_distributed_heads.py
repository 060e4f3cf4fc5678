"""Scores of a network whose head is a DTensor are those of the whole network."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marginops
from helpers.ranks import Ranks, ranks_fixture
from marginops.training import score_batch, select_batch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no torch.distributed"
)
RANKS, CLASSES = 2, 5
INPUTS = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs).relu())


def network_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    network = Network()
    return nn.Sequential(network.body, nn.ReLU(), network.head) if kind == "Sequential" else network


ranks = ranks_fixture(RANKS)


def on_a_rank(groups: Sequence[Any], kind: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = DeviceMesh.from_group(groups[0], "cpu")
    network = network_of(kind)
    inputs = INPUTS
    if kind in ("Sequential", "gathered logits"):
        head = "2" if kind == "Sequential" else "head"
        plan = {head: ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(network, mesh, plan)
    elif kind == "local logits":
        parallelize_module(network, mesh, {"head": ColwiseParallel()})
    else:
        if kind == "FSDP of the head":
            fully_shard(network.head, mesh=mesh)
        fully_shard(network, mesh=mesh)
        inputs = INPUTS.chunk(RANKS)[torch.distributed.get_rank()]
    scores = score_batch(network, inputs)
    with torch.no_grad():
        given = score_batch(network, logits=network(inputs))
    return {"scores": scores, "chosen": select_batch(network, inputs, k=6), "of logits": given}


def expected(inputs: Tensor) -> Tensor:
    network: Any = network_of("whole")
    with torch.no_grad():
        return marginops.minimal_margin_score(network(inputs), network.head.weight)


@pytest.mark.parametrize("kind", ["Sequential", "gathered logits", "FSDP", "FSDP of the head"])
def test_scores(ranks: Ranks, kind: str) -> None:
    parts = INPUTS.chunk(RANKS) if "FSDP" in kind else [INPUTS] * RANKS
    for inputs, answer in zip(parts, ranks.results(on_a_rank, [kind] * RANKS), strict=True):
        scores = expected(inputs)
        torch.testing.assert_close(answer["scores"], scores)
        torch.testing.assert_close(answer["of logits"], scores)
        assert answer["chosen"].tolist() == scores.argsort(stable=True)[:6].tolist()


def test_logits_of_some_classes_are_refused(ranks: Ranks) -> None:
    for answer in ranks(on_a_rank, ["local logits"] * RANKS):
        assert isinstance(answer, ValueError), answer
        assert str(answer).startswith("network: no linear layer has"), answer
