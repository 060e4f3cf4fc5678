"""Where a batch of a trainer holds the inputs, the target and the ids of its samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

Place = Hashable | Callable[[Any], Any]

_TARGETS = ("target", "targets", "label", "labels", "y")
_WRAP = "wrap the data set: Indexed(dataset), for items that are mappings Indexed(dataset, key=...)"


class BatchFields:
    """The places of inputs, target and ids in a batch.

    Args:
        key: The key of the ids in a batch that is a mapping, or the field of a dataclass or named
            tuple. In a tuple or list they are the last element.
        target: The place of the target: a key, a number or a function of the batch. None: the
            second element of a tuple, or the key target, targets, label, labels or y of a mapping.
        inputs: The place of what the network takes. None: the first element of a tuple.
    """

    def __init__(self, key: Hashable, target: Place | None, inputs: Place | None) -> None:
        self._key, self._target, self._inputs = key, target, inputs

    def ids(self, batch: Any) -> Tensor:
        """The ids of the samples, ``[B]`` int64."""
        place = self._key
        if _is_sequence(batch) and not isinstance(place, int):
            place = len(batch) - 1
            taken = 1 if self._target is None else self._target
            if place < 1 or place == taken:
                raise ValueError(
                    f"batch: expected (inputs, target, ids), got {len(batch)} elements; {_WRAP}"
                )
        ids = _part(batch, place, "key", _WRAP)
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
            got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids)
            raise TypeError(
                f"batch: expected the ids of the samples, int64 [B], at {place!r}, got {got}; "
                f"{_WRAP}"
            )
        return ids

    def target(self, batch: Any) -> Any:
        """The classes of the samples."""
        place = self._target
        if place is None:
            if isinstance(batch, Mapping):
                places = [name for name in _TARGETS if name in batch]
                if len(places) != 1:
                    raise ValueError(
                        f"target: expected one of the keys {', '.join(_TARGETS)} in the batch, got "
                        f"{', '.join(map(str, batch))}; pass target= with its key"
                    )
                place = places[0]
            else:
                place = 1 if _is_sequence(batch) else "target"
        return _part(batch, place, "target", "pass target= with its place or a function")

    def inputs(self, batch: Any) -> Any:
        """What the network takes."""
        place = 0 if self._inputs is None and _is_sequence(batch) else self._inputs
        if place is None:
            raise TypeError(
                f"inputs: expected the place of the inputs in a batch of type "
                f"{type(batch).__name__}, got None; pass inputs= with a key or a function"
            )
        return _part(batch, place, "inputs", "pass inputs= with its place or a function")


def _is_sequence(batch: Any) -> bool:
    """Whether a batch has places that are numbers only."""
    return isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")


def _part(batch: Any, place: Any, name: str, advice: str) -> Any:
    if callable(place):
        return place(batch)
    try:
        if isinstance(batch, (Mapping, tuple, list)) and not isinstance(place, str):
            return batch[place]
        return batch[place] if isinstance(batch, Mapping) else getattr(batch, place)
    except (KeyError, IndexError, TypeError, AttributeError):
        parts = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"{name}: expected {place!r} in the batch, got {parts}; {advice}"
        ) from None
