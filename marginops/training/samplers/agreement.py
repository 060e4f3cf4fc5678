"""What ranks have to agree on before they draw an epoch together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Result = TypeVar("_Result")


def together(
    group: ProcessGroup | None,
    function: Callable[[], _Result],
    facts: Callable[[_Result], Mapping[str, int | float]],
) -> _Result:
    """Call a function on all ranks.

    If the function fails on one rank, or the ranks have different facts, all ranks raise an error.
    """
    if group is None:
        return function()
    own, error = {}, None
    try:
        result = function()
        own = dict(facts(result))
    except Exception as raised:
        error = raised
    text = None if error is None else f"{type(error).__name__}: {error}"
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (text, own), group=group)
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"rank {rank} failed: {failure}")
    for name in own:
        values = [other.get(name) for _, other in answers]
        if len(set(values)) > 1:
            raise ValueError(
                f"{name}: expected the same value on all ranks, got "
                f"{', '.join(map(str, values))} on the ranks 0 to {len(values) - 1}"
            )
    return result
