"""A linear head whose weight is a DTensor equals the head with the whole weight."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marginops
from helpers.ranks import Ranks, ranks_fixture
from helpers.sharded import one_process

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no torch.distributed"
)

RANKS, ROWS, CLASSES, COLUMNS = 2, 12, 7, 5  # 4 classes on the first rank, 3 on the second
FUNCTIONS = [
    "linear_classification_margin",
    "linear_log_prob",
    "linear_minimal_margin_score",
    "linear_sample_statistics",
    "linear_select_classification_margin",
    "linear_select_minimal_margin",
]


ranks = ranks_fixture(RANKS)


def example(function: str, has_bias: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"input": (ROWS, COLUMNS), "weight": (CLASSES, COLUMNS)}
    if has_bias:
        shapes["bias"] = (CLASSES,)
    arguments: dict[str, Any] = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    if "minimal" not in function:
        arguments["target"] = torch.arange(ROWS) % CLASSES
        arguments["target"][3] = -100
    if "select" in function:
        arguments["k"] = 4
    return arguments


def call(function: str, arguments: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
    """All results, and a number to differentiate."""
    found = getattr(marginops, function)(**arguments)
    results = [found] if torch.is_tensor(found) else [value for value in found]
    differentiable = [value for value in results if value.requires_grad]
    finite = [value.clamp(-1e3, 1e3) for value in differentiable]
    total = sum((value * (1 + torch.arange(len(value)))).sum() for value in finite)
    return [value.detach() for value in results], torch.as_tensor(total)


def mesh_of(groups: Sequence[Any]) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(groups[0], "cpu")


def distribute(value: Tensor, mesh: Any, *placements: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, mesh, placements)


def on_a_rank(groups: Sequence[Any], argument: tuple[str, bool, bool]) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    function, has_bias, is_replicated = argument
    mesh = mesh_of(groups)
    arguments = example(function, has_bias)
    for name in ("weight", "bias"):
        if name in arguments:
            arguments[name] = distribute(arguments[name], mesh, Shard(0)).requires_grad_()
    if is_replicated:
        for name in ("input", "target"):
            if name in arguments:
                arguments[name] = distribute(arguments[name], mesh, Replicate())
    arguments["input"].requires_grad_()
    results, total = call(function, arguments)
    total.backward()
    gradients = {}
    for name in ("input", "weight", "bias"):
        if name in arguments and (gradient := arguments[name].grad) is not None:
            if hasattr(arguments[name], "placements"):
                assert gradient.placements == arguments[name].placements, name
                assert gradient.shape == arguments[name].shape, name
                gradient = gradient.full_tensor()
            gradients[name] = gradient
    return {"results": results, "gradients": gradients}


@pytest.mark.parametrize("is_replicated", [False, True], ids=["local", "replicated"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_results_and_gradients(
    ranks: Ranks, function: str, has_bias: bool, is_replicated: bool
) -> None:
    arguments = example(function, has_bias)
    for name in ("input", "weight", "bias"):
        if name in arguments:
            arguments[name].requires_grad_()
    expected, total = call(function, arguments)
    total.backward()
    for answer in ranks.results(on_a_rank, [(function, has_bias, is_replicated)] * RANKS):
        torch.testing.assert_close(answer["results"], expected)
        gradients = {
            name: value.grad
            for name, value in arguments.items()
            if getattr(value, "grad", None) is not None
        }
        assert answer["gradients"].keys() == gradients.keys() >= {"input", "weight"}
        torch.testing.assert_close(answer["gradients"], gradients)


def tensor_parallel(groups: Sequence[Any], kind: str) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of a layer that torch splits by classes."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, CLASSES)
    parallelize_module(layer, mesh_of(groups), ColwiseParallel())
    features, target = torch.ones(3, COLUMNS) * torch.arange(3.0)[:, None], torch.arange(3)
    found = marginops.linear_sample_statistics(features, layer.weight, target, layer.bias)
    loss = found.mean_loss()
    loss.backward()
    gradient: Any = layer.weight.grad
    with torch.no_grad():
        torch.optim.SGD(layer.parameters(), 0.1).step()  # takes the gradient
    return loss.detach(), gradient.full_tensor()


def test_layer_of_tensor_parallelism(ranks: Ranks) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, CLASSES)
    features, target = torch.ones(3, COLUMNS) * torch.arange(3.0)[:, None], torch.arange(3)
    loss = nn.functional.cross_entropy(layer(features), target)
    loss.backward()
    for answer in ranks(tensor_parallel, ["ColwiseParallel"] * RANKS):
        torch.testing.assert_close(answer, (loss.detach(), layer.weight.grad))


def wrong_on_a_rank(groups: Sequence[Any], argument: tuple[int, str]) -> str:
    """The error of a wrong call. All ranks raise, so no rank waits for another."""
    from torch.distributed.tensor import Replicate, Shard

    rank, kind = argument
    mesh = mesh_of(groups)
    arguments = example("linear_classification_margin")
    for name in ("weight", "bias"):
        arguments[name] = distribute(arguments[name], mesh, Shard(0))
    if kind == "other features" and rank == 1:
        arguments["input"] = arguments["input"].flip(0)
    elif kind == "other targets" and rank == 1:
        arguments["target"] = arguments["target"].flip(0)
    elif kind == "whole bias":
        arguments["bias"] = arguments["bias"].full_tensor()
    elif kind == "replicated bias":
        arguments["bias"] = distribute(arguments["bias"].full_tensor(), mesh, Replicate())
    elif kind == "split features":
        arguments["input"] = distribute(arguments["input"], mesh, Shard(1))
    elif kind == "group":
        arguments["group"] = groups[0]
    elif kind == "features on one rank alone" and rank == 1:
        arguments["input"] = None
    elif kind == "split columns":
        arguments["weight"] = distribute(example("")["weight"], mesh, Shard(1))
    try:
        marginops.linear_classification_margin(**arguments)
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing wrong", "no error"),
        ("other features", "input: expected the same samples on every rank .* as under FSDP"),
        ("other targets", "target: expected the same samples on every rank"),
        ("whole bias", "bias: expected a DTensor that is sharded as weight, got Tensor; pass dist"),
        ("replicated bias", "bias: expected a DTensor that is sharded as weight, got a DTensor"),
        ("split features", r"input: .* got a DTensor with .*Shard\(dim=1\).*input.full_tensor\(\)"),
        ("group", "group: expected None for a weight that is a DTensor.* leave out group"),
        ("features on one rank alone", "input: expected a tensor|rank 1 of group: input: expected"),
        ("split columns", r"weight: .*got a DTensor with placements \(Shard\(dim=1\),\) .*pass"),
    ],
)
def test_wrong_arguments(ranks: Ranks, kind: str, message: str) -> None:
    for answer in ranks(wrong_on_a_rank, [(rank, kind) for rank in range(RANKS)]):
        assert re.match(message, str(answer)), answer


def rounded_differently(groups: Sequence[Any], rank: int) -> bool:
    """Features of two ranks that differ by rounding are the same samples."""
    from torch.distributed.tensor import Shard

    mesh = mesh_of(groups)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(64, 32, generator=generator)
    weight = distribute(torch.randn(10, 32, generator=generator), mesh, Shard(0))
    if rank == 1:
        features = features * (1 + 1e-3 * torch.randn(64, 32, generator=generator))
    scores = marginops.linear_minimal_margin_score(features, weight)
    return bool(scores.isfinite().all())


def test_rounding_is_no_difference(ranks: Ranks) -> None:
    assert ranks(rounded_differently, range(RANKS)) == [True] * RANKS


def test_mesh_with_two_dimensions_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    with one_process():
        mesh = init_device_mesh("cpu", (1, 1))
        arguments = example("linear_classification_margin", has_bias=False)
        arguments["weight"] = distribute(arguments["weight"], mesh, Replicate(), Shard(0))
        with pytest.raises(TypeError, match=r"^weight: .* a mesh of one dimension, got .*\[1, 1\]"):
            marginops.linear_classification_margin(**arguments)
