"""Networks of any kind run, wrapped or not, and stay as they were."""

from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from helpers.classifiers import (
    BodyAndHead,
    compiled,
    data_parallel,
    group_of_one,
    modes,
    network_with_state,
    returning_logits,
    returning_mapping,
    returning_more,
)
from marginops.networks import (
    call,
    evaluation_mode,
    last_linear,
    output_tensor,
    predict,
    unwrap,
)


@pytest.fixture
def distributed(tmp_path: Path) -> Iterator[None]:
    with group_of_one(tmp_path):
        yield


@pytest.mark.parametrize("wrap", [lambda network: network, data_parallel, compiled])
def test_every_module_evaluates_and_then_has_its_old_mode(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    plain = network_with_state()
    plain[1].eval()
    network = wrap(plain)
    before = modes(network)
    with pytest.raises(KeyError, match="from the body"), evaluation_mode(network):
        assert not any(modes(network))
        raise KeyError("from the body")
    assert modes(network) == before
    assert modes(plain) == [True, True, False, True, True, True]


def test_evaluation_mode_of_a_network_already_evaluating() -> None:
    network = network_with_state().eval()
    with evaluation_mode(network):
        assert not any(modes(network))
    assert not any(modes(network))


def test_head_is_found_by_its_width() -> None:
    network = network_with_state()
    network.append(nn.Identity())
    assert last_linear(network, 4) is network[4]
    assert last_linear(data_parallel(network), 4) is network[4]
    network.add_module("again", network[4])
    assert last_linear(network, 4) is network[4], "one layer under two names is one layer"


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), r"several .* 4 outputs \(0, 1\)"),
        (nn.Sequential(nn.Linear(6, 3), nn.ReLU()), r"no .* 4 outputs \(linear layers: 0: 3\)"),
        (nn.ReLU(), r"no linear layer has 4 outputs \(linear layers: none\)"),
    ],
)
def test_a_missing_or_ambiguous_head_is_an_error(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"^network: {message}; pass head=, the torch.nn.Linear"):
        last_linear(network, 4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda network: network,
        data_parallel,
        DistributedDataParallel,
        torch.compile,
        lambda network: DistributedDataParallel(torch.compile(network)),
        lambda network: torch.compile(DistributedDataParallel(network)),
        lambda network: torch.compile(data_parallel(torch.compile(network))),
    ],
)
def test_wrappers_are_removed(wrap: Callable[[nn.Module], nn.Module], distributed: None) -> None:
    network = network_with_state()
    assert unwrap(wrap(network)) is network


def test_a_users_own_module_is_no_wrapper() -> None:
    network = nn.Module()
    network.module = nn.Linear(6, 4)
    assert unwrap(network) is network


@pytest.mark.parametrize(
    "form",
    [
        lambda left, right: (left, right),
        lambda left, right: [left, right],
        lambda left, right: {"right": right, "left": left},
        lambda left, right: UserDict(right=right, left=left),
    ],
)
def test_inputs_of_every_form(form: Callable[[Tensor, Tensor], Any]) -> None:
    def network(left: Tensor, right: Tensor) -> Tensor:
        return left - right

    left, right = torch.randn(2, 5)
    assert torch.equal(call(network, form(left, right)), left - right)


def test_a_tensor_is_one_input() -> None:
    inputs = torch.randn(2, 5)
    assert call(lambda *arguments: arguments, inputs) == (inputs,)


def test_logits_are_the_output_or_its_attribute() -> None:
    logits = torch.randn(5, 4)
    assert output_tensor(logits) is logits
    assert output_tensor(SimpleNamespace(logits=logits, loss=None)) is logits
    assert output_tensor({"loss": None, "logits": logits}) is logits
    assert output_tensor(UserDict(logits=logits)) is logits


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ((torch.zeros(5, 4),), TypeError, r"expected scores \[N, K\] as output .* got tuple"),
        (
            {"out": torch.zeros(5, 4)},
            TypeError,
            r"expected scores .* got dict; .* not only \['out'",
        ),
        ({"logits": [0.0]}, TypeError, "expected scores .* got dict"),
        ((torch.tensor(1.0), torch.zeros(5, 4)), TypeError, ".* got tuple; leave the labels out"),
        (torch.tensor(1.0), ValueError, r".* got \[\]; leave the labels out of inputs"),
        (SimpleNamespace(logits=None), TypeError, "expected scores .* got SimpleNamespace"),
        (torch.zeros(5), ValueError, r"expected scores of shape \[N, K\], got \[5\]"),
        (
            SimpleNamespace(logits=torch.zeros(5, 4, 3)),
            ValueError,
            r"expected scores of shape \[N, K\], got \[5, 4, 3\]",
        ),
    ],
)
def test_an_output_that_is_no_matrix(output: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^network: {message}"):
        output_tensor(output, "scores", "[N, K]")


@pytest.mark.parametrize("chunk_size", [1, 3, 4096])
@pytest.mark.parametrize("function", [returning_logits, returning_more, returning_mapping])
def test_predictions_are_the_logits_of_all_inputs(
    chunk_size: int, function: Callable[..., Any]
) -> None:
    network, inputs = BodyAndHead(function), torch.randn(10, 6)
    sizes: list[int] = []
    network.body.register_forward_hook(lambda _, arguments, __: sizes.append(len(arguments[0])))
    logits = predict(network, inputs, chunk_size=chunk_size)
    assert sizes == [min(chunk_size, 10 - start) for start in range(0, 10, chunk_size)]
    torch.testing.assert_close(logits, returning_logits(network, inputs).detach())
    assert not logits.requires_grad


def test_predictions_use_evaluation_mode_and_change_nothing() -> None:
    network, inputs = network_with_state(), torch.randn(10, 6)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = predict(network, inputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(modes(network))
    torch.testing.assert_close(logits, network.eval()(inputs).detach())


def test_predict_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        predict(nn.Linear(6, 4), torch.randn(10, 6), chunk_size=0)
    with pytest.raises(ValueError, match=r"network: .* \[B, C\], got \[4, 5, 4\]"):
        predict(nn.Linear(6, 4), torch.randn(10, 5, 6), chunk_size=4)
