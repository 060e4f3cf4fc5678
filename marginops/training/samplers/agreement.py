"""What ranks have to agree on before they draw an epoch together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Result = TypeVar("_Result")


def check_agreement(group: ProcessGroup, facts: Mapping[str, int | float]) -> None:
    """Check that all ranks have the same facts. If not, all ranks raise the same error."""
    gathered: list[Mapping[str, int | float] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, dict(facts), group=group)
    for name in facts:
        values = [None if other is None else other.get(name) for other in gathered]
        if len(set(values)) > 1:
            raise ValueError(
                f"{name}: expected the same value on all ranks, got "
                f"{', '.join(map(str, values))} on the ranks 0 to {len(values) - 1}"
            )


def together(
    group: ProcessGroup | None, function: Callable[[], _Result], checksum: Callable[[_Result], int]
) -> _Result:
    """Call a function on all ranks. If it fails on one, or results differ, all raise an error."""
    if group is None:
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    text = None if error is None else f"{type(error).__name__}: {error}"
    gathered: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, text, group=group)
    if error is not None:
        raise error
    for rank, other in enumerate(gathered):
        if other is not None:
            raise RuntimeError(f"rank {rank} failed: {other}")
    assert result is not None
    check_agreement(group, {"checksum of the weights": checksum(result)})
    return result
