"""The index of an item reaches the batch, whatever the item is."""

import dataclasses
import pickle
from collections import UserDict, namedtuple
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from marginops.training import Indexed

Sample = namedtuple("Sample", ["x", "id"])


@dataclasses.dataclass(frozen=True)
class Record:
    x: int
    id: int = -1


class Fetching(Dataset):
    """A data set that fetches batches at once, and counts how often."""

    def __init__(self) -> None:
        self.fetched: list[list[int]] = []

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("the batch is fetched at once")

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.fetched.append(indices)
        return [{"x": 10 * index} for index in indices]


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter([1])


@pytest.mark.parametrize(
    ("item", "key", "expected"),
    [
        ((7, 8), None, (7, 8, 1)),
        ([7, 8], None, [7, 8, 1]),
        ((), None, (1,)),
        (7, None, (7, 1)),
        ("text", None, ("text", 1)),
        ({"x": 7}, "id", {"x": 7, "id": 1}),
        ({"x": 7}, 0, {"x": 7, 0: 1}),
        (UserDict(x=7), "id", UserDict(x=7, id=1)),
        (MappingProxyType({"x": 7}), "id", {"x": 7, "id": 1}),
        (Sample(7, None), "id", Sample(7, 1)),
        (Record(7), "id", Record(7, 1)),
    ],
)
def test_the_index_is_added(item: Any, key: Any, expected: Any) -> None:
    before = pickle.dumps(dict(item) if isinstance(item, MappingProxyType) else item)
    dataset = Indexed([None, item, None], key)
    (fetched,) = dataset.__getitems__([1])
    for result in (dataset[1], dataset[-2], dataset[torch.tensor(1)], fetched):
        assert result == expected
        assert type(result) is type(expected)
    after = dict(item) if isinstance(item, MappingProxyType) else item
    assert pickle.dumps(after) == before, "the item of the data set has changed"


def test_a_single_tensor_or_array_becomes_a_pair() -> None:
    for item in (torch.arange(3), np.arange(3)):
        first, index = Indexed([item])[0]
        assert first is item and index == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_ids_of_their_samples(workers: int) -> None:
    inputs = torch.arange(300)
    dataset = Indexed(TensorDataset(inputs, -inputs))
    seen = []
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        dataset, batch_size=64, shuffle=True, num_workers=workers, generator=generator
    )
    for x, y, indices in loader:
        assert indices.dtype == torch.int64
        assert torch.equal(x, indices) and torch.equal(y, -indices)
        seen += indices.tolist()
    assert seen != sorted(seen) and sorted(seen) == list(range(300))


def test_a_batch_is_fetched_at_once() -> None:
    inner = Fetching()
    batches = list(DataLoader(Indexed(inner, key="id"), batch_size=4))
    assert inner.fetched == [[0, 1, 2, 3], [4, 5, 6]]
    assert batches[1]["id"].tolist() == [4, 5, 6] and batches[1]["x"].tolist() == [40, 50, 60]


def test_a_subset_may_be_inside_or_outside() -> None:
    dataset = TensorDataset(torch.arange(10))
    inside = DataLoader(Indexed(Subset(dataset, [5, 7])), batch_size=2)
    outside = DataLoader(Subset(Indexed(dataset), [5, 7]), batch_size=2)
    assert [part.tolist() for part in next(iter(inside))] == [[5, 7], [0, 1]]
    assert [part.tolist() for part in next(iter(outside))] == [[5, 7], [5, 7]]


def test_it_is_a_data_set_of_the_same_length_that_can_be_pickled() -> None:
    dataset = Indexed([(4,), (5,)])
    copy = pickle.loads(pickle.dumps(dataset))
    assert isinstance(copy, Dataset) and len(copy) == 2
    assert list(copy) == [(4, 0), (5, 1)], "iteration ends with an IndexError"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Endless(), "dataset: expected a map-style .* got the IterableDataset Endless, .*; let it"),
        (DataLoader([1]), r"got a DataLoader; pass its data set, loader\.dataset"),
        (TensorDataset, "got the class TensorDataset; pass an instance of it"),
        (iter([1]), "got list_iterator without __len__ and __getitem__"),
        ({"a": 1}, "got the mapping dict; pass a list of its values"),
    ],
)
def test_other_data_sets_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Indexed(dataset)


@pytest.mark.parametrize(
    ("item", "key", "error", "message"),
    [
        ({"x": 1}, None, TypeError, r'are mappings \(dict\), got None; pass for example key="ind'),
        ({"x": 1}, "x", ValueError, "key: expected a key that the items do not have, got 'x'"),
        ((1, 2), "id", TypeError, "key: expected None, .* of type tuple, got 'id'; without key="),
        (1, "id", TypeError, "key: expected None, .* of type int"),
        (Sample(1, 2), None, ValueError, r"key: .* of type Sample \(x, id\), got None; give the"),
        (Record(1), "other", ValueError, r"key: expected a field .* Record \(x, id\), got 'other'"),
    ],
)
def test_an_item_that_does_not_go_with_the_key_is_named(item, key, error, message) -> None:
    with pytest.raises(error, match=message):
        Indexed([item], key)[0]


@pytest.mark.parametrize("index", [2, -3])
def test_an_index_out_of_range_is_an_index_error(index: int) -> None:
    with pytest.raises(IndexError, match=f"index: expected at least -2 and below 2, got {index}"):
        Indexed([(1,), (2,)])[index]


@pytest.mark.parametrize("index", [1.0, slice(2), "1"])
def test_an_index_of_another_type_is_named(index: Any) -> None:
    with pytest.raises(TypeError, match=f"index: expected an int, got {type(index).__name__}"):
        Indexed([(1,), (2,)])[index]
