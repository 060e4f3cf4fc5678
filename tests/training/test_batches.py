"""Batches of any structure: size, rows, device, and what is refused because it is not clear."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from marginops.training import batch_size, take, to_device

Point = namedtuple("Point", ["x", "y"])
ROWS = [3, 0, 3]
X, Y = torch.arange(10).view(5, 2), torch.arange(5)
TEXTS = ["a", "b", "c", "d", "e"]


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float = 2.0
    derived: Any = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "derived", self.x + 1)


@dataclasses.dataclass
class Slots:
    __slots__ = ("names", "x")
    x: Tensor
    names: list[str]


class Encoding(UserDict):
    """A mapping of its own type that finds its keys as attributes, as tokenizers return it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Closed(UserDict):
    """A mapping that is not made from a dict."""

    def __init__(self) -> None:
        super().__init__(x=X)


class Kept(dict):
    """A dict of another type."""


def flat(batch: Any) -> list[Any]:
    """The parts of a batch in a fixed order, by plain recursion over its public interface."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return [np.asarray(batch).tolist()]
    if isinstance(batch, (dict, UserDict)):
        return [part for key in batch for part in (key, *flat(batch[key]))]
    if isinstance(batch, (list, tuple)):
        return [part for each in batch for part in flat(each)]
    if dataclasses.is_dataclass(batch):
        return flat([getattr(batch, field.name) for field in dataclasses.fields(batch)])
    return [batch]


X3, Y3, TEXTS3 = [[6, 7], [0, 1], [6, 7]], [3, 0, 3], ["d", "a", "d"]


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, [X3]),
        ((X, Y), [X3, Y3]),
        ([X, Y], [X3, Y3]),
        (Point(X, Y), [X3, Y3]),
        ({"x": X, "y": Y}, ["x", X3, "y", Y3]),
        (OrderedDict(y=Y, x=X), ["y", Y3, "x", X3]),
        (Encoding(x=X, y=Y), ["x", X3, "y", Y3]),
        (Kept(x=X), ["x", X3]),
        (Frozen(X), [X3, 2.0, [[7, 8], [1, 2], [7, 8]]]),
        (Slots(X, TEXTS), [X3, *TEXTS3]),
        (X.numpy(), [X3]),
        (TEXTS, TEXTS3),
        ([X, tuple(TEXTS)], [X3, *TEXTS3]),
        ([{"id": 1}, {"id": 2}, 3, 4, 5], [4, "id", 1, 4]),
        ({"deep": [Point(Encoding(x=X), (Y,)), TEXTS]}, ["deep", "x", X3, Y3, *TEXTS3]),
        (
            {"x": X, "none": None, "text": "abcde", "number": 5, "scalar": torch.tensor(7)},
            ["x", X3, "none", None, "text", "abcde", "number", 5, "scalar", 7],
        ),
        ((X, (), [], {}), [X3]),
        ((X, Path("a"), np.float64(2)), [X3, Path("a"), 2.0]),
    ],
)
@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_take_keeps_the_structure(batch, expected, kind) -> None:
    before = flat(batch)
    taken = take(batch, kind(ROWS))
    assert type(taken) is type(batch)
    assert flat(taken) == expected
    assert flat(batch) == before, "the batch itself has changed"
    assert batch_size(batch) == 5 and batch_size(taken) == 3


def test_a_tuple_of_rows_stays_a_tuple() -> None:
    assert take((X, tuple(TEXTS)), [1])[1] == ("b",)


def test_parts_without_rows_are_the_same_objects() -> None:
    marker = object()
    assert take({"x": X, "marker": marker}, [0])["marker"] is marker


def test_no_rows_can_be_taken() -> None:
    taken = take({"x": X, "text": TEXTS, "array": X.numpy()}, [])
    assert taken["x"].shape == (0, 2) and taken["text"] == [] and taken["array"].shape == (0, 2)
    assert take(X, torch.zeros(0, dtype=torch.int64)).shape == (0, 2)


def test_taken_rows_are_differentiable() -> None:
    x = torch.randn(5, 2, requires_grad=True)
    take({"x": x}, ROWS)["x"].sum().backward()
    assert x.grad.tolist() == [[1, 1], [0, 0], [0, 0], [2, 2], [0, 0]]


def test_int32_indices_and_fake_tensors_work() -> None:
    assert take(Y, torch.tensor([4], dtype=torch.int32)).tolist() == [4]
    with FakeTensorMode():
        assert take((torch.zeros(5, 2),), torch.zeros(3, dtype=torch.int64))[0].shape == (3, 2)


def test_to_device_moves_tensors_only() -> None:
    batch = {"x": X, "deep": [Point(Encoding(y=Y), TEXTS)], "text": "abc", "frozen": Frozen(X)}
    moved = to_device(batch, "meta")
    point = moved["deep"][0]
    tensors = moved["x"], point.x["y"], moved["frozen"].x, moved["frozen"].derived
    assert all(tensor.is_meta for tensor in tensors)
    assert isinstance(point, Point) and isinstance(point.x, Encoding)
    assert point.y == TEXTS and moved["text"] == "abc"
    assert batch["x"].device.type == "cpu"
    ragged = to_device((torch.zeros(2), torch.zeros(3), [["a"], ["b", "c"]]), "meta")
    assert ragged[2] == [["a"], ["b", "c"]]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X, torch.zeros(4)), ValueError, r"batch: expected one number of samples .* got \[5, 4\]"),
        ((X, ["a"]), ValueError, r"got \[5, 1\]; take out what does not have one row"),
        ({"x": X, "shape": (28, 28)}, ValueError, r"got \[5, 2\]"),
        ({"scale": 1.0}, ValueError, "batch: expected a tensor, .*, got dict without any"),
        (torch.tensor(1), ValueError, "got Tensor without any"),
        ((TEXTS, TEXTS), TypeError, "batch: .* got a tuple that holds a list and no tensor, which"),
        ([[1, 2], [3, 4]], TypeError, "got a list that holds a list .*; give the lists names"),
        (
            Closed(),
            TypeError,
            r"mappings whose class takes a dict, got Closed; pass dict\(\.\.\.\)",
        ),
        ([{"text": TEXTS}], TypeError, "got a list that holds a list"),
        (
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            TypeError,
            r"batch: expected dense tensors, got a nested tensor; pass \.to_padded_tensor",
        ),
        (
            {"x": torch.eye(3).to_sparse_csr()},
            TypeError,
            r"batch: expected dense or COO tensors, got layout torch\.sparse_csr; pass ",
        ),
        (
            {"x": nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)])},
            TypeError,
            "got a PackedSequence; pass padded sequences",
        ),
    ],
)
def test_batches_that_are_not_clear_are_refused(batch, error, message) -> None:
    for call in (batch_size, lambda batch: take(batch, [0])):
        with pytest.raises(error, match=message):
            call(batch)


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([5], ValueError, r"indices: expected rows in \[0, 5\), got 5"),
        (torch.tensor([0, -1]), ValueError, r"indices: expected rows in \[0, 5\), got -1"),
        (torch.ones(5, dtype=torch.bool), TypeError, r"torch\.bool; pass indices\.nonzero"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, r"expected shape \[k\].*got \[2, 2\]"),
        ([0.5], TypeError, r"indices: expected .* int64 or int32, got \[1\] of torch\.float32"),
        (1, TypeError, r"indices: expected a tensor \[k\] or a list of ints, got int$"),
        ("12", TypeError, "indices: .*, got str$"),
        (None, TypeError, "indices: .*, got NoneType$"),
        (slice(2), TypeError, "indices: .*, got slice$"),
        (iter([1]), TypeError, "indices: .*, got list_iterator$"),
    ],
)
def test_wrong_indices_are_named(indices, error, message) -> None:
    with pytest.raises(error, match=message):
        take({"x": X, "text": TEXTS}, indices)


def test_a_selection_is_named() -> None:
    chosen = torch.return_types.sort((torch.zeros(2), torch.tensor([0, 1])))
    with pytest.raises(TypeError, match=r"indices: expected a tensor .*; pass its indices"):
        take(X, chosen)
