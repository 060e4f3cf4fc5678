"""Inputs that are no batch: the error says what the network takes and what to pass."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.classifiers import BodyAndHead, Pair, compiled, returning_logits
from marginops.networks import call, features_and_logits, last_linear, predict, unwrap
from marginops.training import select_batch

X, Y = torch.randn(10, 6), torch.arange(10) % 4


class Text(BodyAndHead):
    """Takes labels and returns a loss, as the classifiers of Transformers do."""

    def __init__(self) -> None:
        super().__init__(returning_logits)

    def forward(self, inputs: Tensor, labels: Tensor | None = None, form: str = "object") -> Any:
        logits = super().forward(inputs)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        if form == "object":
            return SimpleNamespace(loss=loss, logits=logits)
        return loss if form == "loss" else (loss, logits)


class Variadic(BodyAndHead):
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(self.body(*inputs))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def bilinear() -> nn.Bilinear:
    return nn.Bilinear(6, 6, 4)


NO_TARGETS = r"; pass x alone if they are a batch \(x, y\), because inputs hold no targets$"


@pytest.mark.parametrize("run", [call, lambda n, x: select_batch(n, x, 3)], ids=["call", "select"])
@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (sequential, (X, Y), r"expected .* of network\.forward\(input\), got 2 .*" + NO_TARGETS),
        (sequential, [X, Y], r"expected .* of network\.forward\(input\), got 2 .*" + NO_TARGETS),
        (lambda: compiled(sequential()), (X, Y), r".*forward\(input\), got 2 .*" + NO_TARGETS),
        (lambda: nn.DataParallel(sequential()), (X, Y), ".*" + NO_TARGETS),
        (lambda: Variadic(returning_logits), (X, Y), ".*got 2 positional .*" + NO_TARGETS),
        (
            sequential,
            {"input": X, "labels": Y},
            r".*got the keys \['input', 'labels'\] .*; leave out ",
        ),
        (Pair, {"left": X}, ".*forward.left, right., .* argument: 'right'.*; add what is missing"),
        (Pair, X, ".*forward.left, right., got 1 .* argument: 'right'.*; pass a tuple of all"),
        (sequential, DataLoader(X), "expected a batch .* DataLoader .*; pass inputs of one batch"),
        (sequential, iter(DataLoader(X)), "expected a batch .*; pass inputs of one batch"),
        (sequential, TensorDataset(X, Y), "expected a batch .* TensorDataset .* of one batch"),
        (sequential, X.numpy(), r"expected a batch .* ndarray .*; pass torch\.as_tensor\(inputs\)"),
        (
            bilinear,
            (X, X.numpy()),
            r".*ndarray as inputs\[1\]; pass torch\.as_tensor\(inputs\[1\]\)",
        ),
        (
            bilinear,
            {"input1": X, "input2": X.numpy()},
            r".*ndarray as inputs\['input2'\]; pass torch\.as_",
        ),
        (sequential, list(X), r".*got 10 positional .*; pass torch\.stack\(inputs\) if they are"),
        (sequential, list(zip(X, Y, strict=True)), r".*list of tuple; .*stack\(\[x for x, _ in"),
        (sequential, X.tolist(), r"expected one batch, got a list of list; pass torch\.as_tensor"),
        (sequential, None, "expected a batch of tensors, got NoneType"),
    ],
)
def test_inputs_that_are_no_batch(
    run: Callable[..., Any], make: Callable[[], nn.Module], inputs: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=f"^inputs: {message}") as raised:
        run(make(), inputs)
    assert raised.value.__cause__ is not None, "the error of the network"


def test_errors_of_the_network_itself_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(sequential(), X[:, :5])

    def fails(first: Tensor, second: Tensor) -> Tensor:
        raise TypeError("of the network")

    with pytest.raises(TypeError, match=r"^of the network$"):
        call(fails, (X, X))

    def is_full(first: Tensor, second: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        call(is_full, (X, X.numpy()))


def test_a_network_may_take_what_is_no_tensor() -> None:
    class Own(nn.Module):
        def forward(self, rows: np.ndarray) -> int:
            return len(rows)

    assert call(Own(), X.numpy()) == 10


@pytest.mark.parametrize(("form", "error"), [("loss", ValueError), ("tuple", TypeError)])
def test_labels_that_make_the_network_return_a_loss(form: str, error: type[Exception]) -> None:
    network = Text()
    with pytest.raises(error, match=r"; leave the labels out of inputs if this is a loss$"):
        select_batch(network, {"inputs": X, "labels": Y, "form": form}, 3)
    chosen = select_batch(network, {"inputs": X, "labels": Y}, 3)
    assert torch.equal(chosen, select_batch(network, X, 3))


def test_a_single_sample_needs_a_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"got \[8\]; add a batch dimension to inputs"):
        select_batch(sequential(), X[0], 1)


@pytest.mark.parametrize("inputs", [[X], DataLoader(X), X.numpy()])
def test_predict_takes_one_tensor(inputs: Any) -> None:
    with pytest.raises(TypeError, match=r"^inputs: expected a tensor, got .*; pass "):
        predict(sequential(), inputs)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (returning_logits, "got function"),
        (BodyAndHead, "got the class BodyAndHead; pass an instance of it"),
        (X, "got Tensor"),
        (torch.export.export(nn.Linear(6, 4), (X,)), r"ExportedProgram; pass network\.module\(\)"),
    ],
)
def test_what_is_no_network(network: Any, message: str) -> None:
    for run in (
        unwrap,
        lambda network: predict(network, X),
        lambda network: last_linear(network, 4),
        lambda network: select_batch(network, X, 3),
        lambda network: features_and_logits(network, X, nn.Linear(6, 4)),
    ):
        with pytest.raises(TypeError, match=f"^network: expected a torch.nn.Module, .*{message}"):
            run(network)


@pytest.mark.parametrize("head", [None, "head"])
def test_what_is_no_head(head: Any) -> None:
    with pytest.raises(TypeError, match=r"^head: expected a torch\.nn.Module, got "):
        features_and_logits(sequential(), X, head)


def test_a_head_by_its_name() -> None:
    with pytest.raises(TypeError, match=r"^head: .* str; pass network\.get_submodule\('0'\), or w"):
        select_batch(sequential(), X, 3, head="0")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network_needs_a_weight() -> None:
    plain = sequential()
    scripted = torch.jit.trace(plain, X)
    with pytest.raises(ValueError, match=r"linear layers: none.*weight=, the tensor"):
        select_batch(scripted, X, 3)
    chosen = select_batch(scripted, X, 3, weight=plain[1].weight)
    assert torch.equal(chosen, select_batch(plain, X, 3))
