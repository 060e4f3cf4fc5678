"""features_and_logits: networks of any kind, wrapped or compiled."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from helpers.classifiers import (
    BodyAndHead,
    Pair,
    by_keyword,
    compiled,
    data_parallel,
    group_of_one,
    modes,
    network_with_state,
    returning_logits,
    returning_mapping,
    returning_more,
)
from marginops.networks import evaluation_mode, features_and_logits


@pytest.fixture
def distributed(tmp_path: Path) -> Iterator[None]:
    with group_of_one(tmp_path):
        yield


def assert_sees_body_and_head(
    network: nn.Module, inputs: Tensor, body: nn.Module, head: nn.Linear
) -> None:
    features, logits = features_and_logits(network, inputs, head)
    with torch.no_grad(), evaluation_mode(body):
        expected = body(inputs)
        torch.testing.assert_close(features, expected, rtol=0, atol=0)
        torch.testing.assert_close(logits, head(expected), rtol=0, atol=0)
    assert not features.requires_grad and not logits.requires_grad
    assert not head._forward_pre_hooks and not head._forward_hooks


@pytest.mark.parametrize(
    "function", [returning_logits, by_keyword, returning_more, returning_mapping]
)
def test_features_and_logits_come_from_body_and_head(function: Callable[..., Any]) -> None:
    network = BodyAndHead(function)
    assert_sees_body_and_head(network, torch.randn(5, 6), network.body, network.head)


def test_features_use_evaluation_mode_and_change_nothing() -> None:
    network = network_with_state()
    network[3].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert_sees_body_and_head(network, torch.randn(5, 6), network[:-1], network[-1])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert modes(network) == [True, True, True, True, False, True]


def test_features_of_structured_inputs() -> None:
    network = Pair()
    left, right = torch.randn(2, 5, 6)
    features, logits = features_and_logits(network, {"left": left, "right": right}, network.head)
    assert torch.equal(features, left * right)
    assert torch.equal(logits, network.head(left * right))


@pytest.mark.parametrize(
    "wrap",
    [
        data_parallel,
        DistributedDataParallel,
        compiled,
        lambda network: compiled(DistributedDataParallel(network)),
    ],
)
def test_features_of_a_wrapped_network_that_has_run(
    wrap: Callable[[nn.Module], nn.Module], distributed: None
) -> None:
    plain = network_with_state().eval()
    network = wrap(plain)
    inputs = torch.randn(5, 6, device=plain[0].weight.device)
    network(inputs)
    # The forward of a wrapper may wait for other processes, so it must not run.
    network.register_forward_pre_hook(lambda *_: pytest.fail("the wrapper ran"))
    assert_sees_body_and_head(network, inputs, plain[:-1], plain[-1])


@pytest.mark.parametrize("part", ["", "body", "head"])
def test_features_of_a_network_compiled_in_place(part: str) -> None:
    """A compiled graph does not call hooks that are set later."""
    network, inputs = BodyAndHead(returning_logits).eval(), torch.randn(5, 6)
    network.get_submodule(part).compile(backend="eager")
    with torch.no_grad():
        network(inputs)
    assert_sees_body_and_head(network, inputs, network.body, network.head)


def test_features_of_a_network_that_holds_a_compiled_one() -> None:
    network, inputs = BodyAndHead(returning_logits).eval(), torch.randn(5, 6)
    network.whole = compiled(nn.Sequential(network.body, network.head))
    network.function = lambda network, inputs: network.whole(inputs)
    with torch.no_grad():
        network(inputs)
    assert_sees_body_and_head(network, inputs, network.body, network.head)


def test_a_compiled_network_runs_compiled_afterwards() -> None:
    runs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        def run(*arguments: Tensor) -> Any:
            runs.append(len(arguments))
            return graph(*arguments)

        return run

    plain, inputs = BodyAndHead(returning_logits).eval(), torch.randn(5, 6)
    network = torch.compile(plain, backend=backend)
    network(inputs)
    features_and_logits(network, inputs, plain.head)
    assert len(runs) == 1
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        features_and_logits(network, torch.randn(5, 7), plain.head)
    network(inputs)
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda network, inputs: network.body(inputs),
            ValueError,
            "head: expected network to call this layer once in a forward pass, got 0 calls",
        ),
        (
            lambda network, inputs: (
                returning_logits(network, inputs) + returning_logits(network, -inputs)
            ),
            ValueError,
            "head: expected network to call this layer once in a forward pass, got 2 calls",
        ),
        (
            lambda network, inputs: returning_logits(network, inputs[:, None]).mean(1),
            ValueError,
            r"head: .* with features of shape \[B, D\], got \[5, 1, 8\]",
        ),
        (
            lambda network, inputs: returning_logits(network, inputs)[0],
            ValueError,
            r"network: expected logits of shape \[B, C\], got \[4\]",
        ),
        (
            lambda network, inputs: (returning_logits(network, inputs),),
            TypeError,
            r"network: expected logits \[B, C\] .* got tuple",
        ),
        (
            lambda network, inputs: returning_logits(network, inputs[:, :5]),
            RuntimeError,
            "shapes cannot be multiplied",
        ),
    ],
)
def test_a_refused_network_stays_as_it_was(
    function: Callable[[BodyAndHead, Tensor], Any], error: type[Exception], message: str
) -> None:
    network = BodyAndHead(function)
    network.body[1].eval()
    before = modes(network)
    with pytest.raises(error, match=message):
        features_and_logits(network, torch.randn(5, 6), network.head)
    assert modes(network) == before
    assert not network.head._forward_pre_hooks and not network.head._forward_hooks
