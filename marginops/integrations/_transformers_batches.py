"""Batches that hold the indices of their samples, and their shares for several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from itertools import islice
from typing import Any

import torch

from ..training import Indexed
from ..training.samplers.epoch_sampler import EpochSampler


class Numbered(Indexed):
    """The items of a data set as pairs of item and index, whatever they are."""

    def __init__(self, dataset: Any) -> None:
        if dataset is None:
            raise TypeError("train_dataset: expected a data set, got None")
        super().__init__(dataset)

    def set_epoch(self, epoch: int) -> None:
        """Pass on what hosts tell data sets that have this method."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: Iterable[int]) -> list[Any]:
        """The items of a batch of a sampler, whose indices need no check."""
        rows = list(indices)
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(rows) if fetch else [self.dataset[row] for row in rows]
        return list(zip(items, rows, strict=True))

    def _with_index(self, item: Any, index: int) -> Any:
        return item, index


class NumberedCollator:
    """Collates items without their indices, and adds the indices to the batch."""

    def __init__(self, collator: Callable[[list[Any]], Any], key: str) -> None:
        self.collator, self.key = collator, key

    def __call__(self, items: list[tuple[Any, int]]) -> MutableMapping[str, Any]:
        batch = self.collator([item for item, _ in items])
        if not isinstance(batch, MutableMapping):
            raise TypeError(
                f"data_collator: expected a dict of tensors, got {type(batch).__name__}"
            )
        if self.key in batch:
            raise ValueError(
                f"key: expected a name that the batches do not have, got {self.key!r}, a column "
                "of the data set; pass another one to MarginTrainer"
            )
        batch[self.key] = torch.tensor([index for _, index in items], device="cpu")
        return batch


class SharedBatches:
    """The batches of all processes in turn, as accelerate shares them among the processes.

    The batches have no fixed size for accelerate. Otherwise it would fill up the last ones with the
    first samples of the epoch. They are padded here as EpochSampler does it.

    A host that resumes skips as many batches as were consumed. The sampler begins after them, so
    there are empty batches in their place.
    """

    def __init__(self, order: EpochSampler, size: int, num_processes: int, drop_last: bool) -> None:
        self._order, self._size, self._num_processes = order, size, num_processes
        self._drop_last = drop_last

    def __len__(self) -> int:
        rounds = len(self._order) / (self._size * self._num_processes)
        return self._num_processes * (int(rounds) if self._drop_last else math.ceil(rounds))

    def __iter__(self) -> Iterator[list[int]]:
        ids, count = iter(self._order), self._num_processes
        for _ in range(self._order.position // (self._size * count) * count):
            yield []
        while chunk := list(islice(ids, self._size * count)):
            if self._drop_last and len(chunk) < self._size * count:
                return
            over = len(chunk) % count
            if over:
                last = chunk[-over:]
                chunk += [last[rank % over] for rank in range(over, count)]
            for rank in range(count):
                yield chunk[rank::count]
