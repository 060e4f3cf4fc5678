"""A data set whose items know their index, so that what training sees of a sample can be kept."""

import copy
import dataclasses
import operator
from collections.abc import Hashable, Iterable, Mapping, MutableMapping
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset


class Indexed(Dataset[Any]):
    """A map-style data set with the index of each item added to the item.

    The index is the id of the sample for :class:`marginops.training.TrainingDynamics`. What it
    becomes depends on the item:

    ============================================== =================================================
    item                                           item with index
    ============================================== =================================================
    tuple or list                                  one more element, the last
    mapping                                        one more key: ``key``
    named tuple or dataclass with a field ``key``  this field holds the index
    anything else: a tensor, an array, an image    the tuple ``(item, index)``
    ============================================== =================================================

    Args:
        dataset: A map-style data set of N items, with ``__len__`` and ``__getitem__``. Its
            ``__getitems__``, if it has one, fetches a batch at once.
        key: The key or the name of the field for the index. Only for items that are mappings, named
            tuples or dataclasses; they need it.

    Raises:
        TypeError: ``dataset`` is not map-style, or an item does not go with ``key``.
        ValueError: An item has ``key`` already, or has no such field.

    The items of ``dataset`` are not changed. The index is an int in [0, N), which
    :func:`torch.utils.data.default_collate` makes int64. ``Indexed(Subset(dataset, rows))`` counts
    inside the subset, and ``Subset(Indexed(dataset), rows)`` keeps the index in ``dataset``.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from marginops.training import Indexed
        >>> dataset = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> for inputs, target, indices in DataLoader(Indexed(dataset), batch_size=3):
        ...     print(target, indices)
        tensor([0, 1, 2]) tensor([0, 1, 2])
        tensor([0, 1, 2]) tensor([3, 4, 5])
    """

    def __init__(self, dataset: Any, key: Hashable | None = None) -> None:
        if problem := _problem_of(dataset):
            raise TypeError(
                "dataset: expected a map-style data set with __len__ and __getitem__, got "
                f"{problem}"
            )
        self.dataset = dataset
        self.key = key

    def __len__(self) -> int:
        """The number N of items."""
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The item with its index. Negative indices count from the end."""
        index = _checked(index, len(self.dataset))
        return self._with_index(self.dataset[index], index)

    def __getitems__(self, indices: Iterable[int]) -> list[Any]:
        """The items of a batch, fetched at once if ``dataset`` can do that."""
        count = len(self.dataset)
        checked = [_checked(index, count) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(checked) if fetch else [self.dataset[index] for index in checked]
        return [self._with_index(*pair) for pair in zip(items, checked, strict=True)]

    def _with_index(self, item: Any, index: int) -> Any:
        if type(item) is tuple and self.key is None:  # most are, and this is the fastest way
            return (*item, index)
        kind = type(item).__name__
        if isinstance(item, Mapping):
            if self.key is None:
                raise TypeError(
                    f"key: expected a key for the index, because the items are mappings ({kind}), "
                    'got None; pass for example key="index"'
                )
            if self.key in item:
                raise ValueError(
                    f"key: expected a key that the items do not have, got {self.key!r}; pass "
                    "another one"
                )
            result = copy.copy(item) if isinstance(item, MutableMapping) else dict(item)
            result[self.key] = index
            return result
        if hasattr(item, "_fields") or dataclasses.is_dataclass(item):
            return self._in_field(item, index)
        if self.key is not None:
            raise TypeError(
                f"key: expected None, because the items are no mappings but of type {kind}, got "
                f"{self.key!r}; without key= the index is the last element of a tuple"
            )
        if isinstance(item, list):
            return [*item, index]
        return (*item, index) if isinstance(item, tuple) else (item, index)

    def _in_field(self, item: Any, index: int) -> Any:
        is_tuple = isinstance(item, tuple)
        names = item._fields if is_tuple else [field.name for field in dataclasses.fields(item)]
        if self.key not in names:
            raise ValueError(
                f"key: expected a field of the items, which are of type {type(item).__name__} "
                f"({', '.join(names)}), got {self.key!r}; give the type a field for the index and "
                "pass its name"
            )
        replace = item._replace if is_tuple else lambda **field: dataclasses.replace(item, **field)
        return replace(**{str(self.key): index})


def _checked(index: Any, count: int) -> int:
    try:
        index = operator.index(index)
    except TypeError as error:
        raise TypeError(f"index: expected an int, got {type(index).__name__}") from error
    if not -count <= index < count:
        raise IndexError(f"index: expected at least {-count} and below {count}, got {index}")
    return index % count


def _problem_of(dataset: Any) -> str:
    """What is wrong with a data set, and what to do; empty for a map-style one."""
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        return "a DataLoader; pass its data set, loader.dataset"
    if isinstance(dataset, type):
        return f"the class {dataset.__name__}; pass an instance of it"
    if isinstance(dataset, IterableDataset):
        return (
            f"the IterableDataset {kind}, whose items have no index; let it yield the id of each "
            "sample, an int in [0, N)"
        )
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(dataset, name)]
    if missing:
        return f"{kind} without {' and '.join(missing)}"
    if isinstance(dataset, Mapping):
        return f"the mapping {kind}; pass a list of its values"
    return ""
