"""Calls an op for all elements of the batch of ``torch.vmap``."""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor


class Batch:
    """The arguments of an op inside ``torch.vmap``.

    Attributes:
        size: The number of elements of the batch.
        values: The arguments by name, in the order of the schema. Those that differ between the
            elements have the batch as their first dimension.
        names: The names of the arguments that differ between the elements.
    """

    def __init__(self, size: int, values: dict[str, Any], names: Collection[str]) -> None:
        self.size = size
        self.values = values
        self.names = frozenset(names)

    @classmethod
    def of_dims(
        cls, size: int, names: Collection[str], arguments: Collection[Any], dims: Collection[Any]
    ) -> "Batch":
        """The batch of arguments, of which each has the batch in its dimension of ``dims``."""
        every = list(zip(names, arguments, dims, strict=True))
        values = {
            name: value if dim is None else value.movedim(dim, 0) for name, value, dim in every
        }
        return cls(size, values, [name for name, _, dim in every if dim is not None])

    def replace(self, **values: Any) -> "Batch":
        """A batch with other values of some arguments, the same for all elements unless listed."""
        return Batch(self.size, self.values | values, self.names - values.keys())

    def replace_each(self, **values: Tensor) -> "Batch":
        """A batch with other values of some arguments, which differ between the elements."""
        return Batch(self.size, self.values | values, self.names | values.keys())

    def elements(self) -> Iterator[list[Any]]:
        """The arguments of one element after the other."""
        for index in range(self.size):
            yield [
                value[index].contiguous() if name in self.names else value
                for name, value in self.values.items()
            ]

    def joined(self, name: str) -> Any:
        """An argument with the rows of all elements in one dimension, ``[E * N, ...]``."""
        value = self.values[name]
        if value is None:
            return None
        if name not in self.names:
            value = value.expand(self.size, *value.shape)
        return value.reshape(self.size * value.shape[1], *value.shape[2:])

    def split(self, value: Tensor, rows: int) -> Tensor:
        """``[E, N, ...]``: a result with ``rows`` rows of each element.

        A result that is not asked for is empty, and stays empty.
        """
        if value.shape[0] != self.size * rows:
            return value.expand(self.size, *value.shape)
        return value.reshape(self.size, rows, *value.shape[1:])

    def offset(self, step: int, like: Tensor) -> Tensor:
        """``[E, 1]``: ``step`` times the number of the element, to number all rows of a batch."""
        return torch.arange(self.size, device=like.device).unsqueeze(1) * step
