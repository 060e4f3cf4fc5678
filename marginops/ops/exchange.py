"""What the processes of a group tell each other before they compute together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist


@dataclass(frozen=True)
class RankArguments:
    """What a rank tells the other ranks about its arguments.

    Attributes:
        must_agree: Properties that have to be the same on all ranks, by name.
    """

    must_agree: dict[str, Any]


Arguments = TypeVar("Arguments", bound=RankArguments)


def exchange(group: Any, check: Callable[[], Arguments]) -> list[Arguments]:
    """Check the arguments of this rank and exchange the results with all ranks.

    If the check of one rank fails, or if the ranks disagree, every rank raises an error. So no
    rank waits for another one that has raised.
    """
    if not dist.is_available():
        raise RuntimeError("group: this build of PyTorch has no torch.distributed")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that this process is a member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    problem: Exception | None = None
    own: Arguments | str
    try:
        own = check()
    except Exception as error:  # of any kind, because the other ranks wait for the result
        problem, own = error, str(error)
    all_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(all_ranks, own, group=group)
    if problem is not None:
        raise problem
    for rank, arguments in enumerate(all_ranks):
        if isinstance(arguments, str):
            raise ValueError(f"rank {rank} of group: {arguments}")
    for name in all_ranks[0].must_agree:
        values = [arguments.must_agree.get(name) for arguments in all_ranks]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: expected the same on every rank of group, got {values}")
    return all_ranks
