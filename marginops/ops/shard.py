"""The classes of a linear head spread over the processes of a group, and what these exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from .class_sum import sum_pairs
from .linear_head import head_sums
from .row_sums import ELSEWHERE, RowSums, merge, within
from .tiles import check_chunk_bytes, tile_shape


@dataclass(frozen=True)
class Shard:
    """This rank's classes, [start, stop) of all, and how it computes their logits."""

    group: dist.ProcessGroup
    sizes: list[int]
    start: int
    stop: int
    dtype: torch.dtype | None
    chunk_bytes: int | None

    @property
    def classes(self) -> slice:
        """This rank's among all."""
        return slice(self.start, self.stop)

    def local(self, classes: Tensor) -> Tensor:
        """Classes of all as classes of this rank, or elsewhere."""
        return within(classes, self.classes)

    def gather(self, value: Tensor) -> Tensor:
        """[R, ...]: the tensors of all ranks."""
        parts = [torch.empty_like(value) for _ in self.sizes]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, rounded once."""
        total = value.to(result_dtype(value.dtype), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(value.dtype)

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """Rows of the whole weight on every rank; exact, since all but one rank add 0."""
        local = self.local(classes)
        found = weight.new_zeros((len(classes), *weight.shape[1:]))
        here = (local != ELSEWHERE).nonzero().squeeze(1)
        found[here] = weight[local[here]]
        return self.sum(found)

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """The sums of this rank's classes."""
        local = self.local(pair)
        here = (local.t().flatten() != ELSEWHERE).nonzero().squeeze(1)
        return sum_pairs(value, rows, local, count, here)


@dataclass(frozen=True)
class _Found:
    """What a rank tells the others about its arguments.

    Attributes:
        same: By name, what has to be the same on all ranks.
        classes: How many it has.
        targets: The smallest and the largest.
    """

    same: dict[str, Any]
    classes: int
    targets: tuple[int, int] | None


def open_shard(
    function: str,
    head: tuple[Any, Any, Any],
    chunk_bytes: Any,
    group: Any,
    check: Callable[[], dict[str, Any]],
    labels: tuple[Any, Any] | None = None,
) -> Shard:
    """Check the arguments of all ranks: if those of one are wrong, every rank raises.

    Args:
        function: What is computed.
        head: Features, weight and bias.
        chunk_bytes: Room for logits.
        group: The ranks.
        check: Checks all further arguments; returns those that have to be the same.
        labels: Targets and ``ignore_index``.
    """
    input, weight, bias = head

    def check_all() -> _Found:
        dtype = checks.check_linear(input, weight, bias)
        check_chunk_bytes(chunk_bytes, weight, dtype)
        others = check()
        same = {
            "function": function,
            "input (shape, dtype, requires_grad)": [
                *input.shape,
                str(input.dtype),
                records_gradient(input),
            ],
            "weight (dtype)": str(weight.dtype),
            "bias (dtype)": None if bias is None else str(bias.dtype),
            "weight and bias (requires_grad)": records_gradient(weight, bias),
            "autocast (dtype)": str(dtype),
            **others,
        }
        return _Found(same, len(weight), None if labels is None else _targets(*labels))

    everyone = _exchange(group, check_all)
    sizes = [found.classes for found in everyone]
    total = sum(sizes)
    if total < 2:
        raise ValueError(f"weight: expected at least 2 classes on all ranks of group, got {sizes}")
    for rank, found in enumerate(everyone):
        low, high = found.targets or (0, 0)
        if low < 0 or high >= total:
            raise RuntimeError(
                f"target: expected classes in [0, {total}) or ignore_index, "
                f"got {low if low < 0 else high} on rank {rank} of group"
            )
    rank = dist.get_rank(group)
    start = sum(sizes[:rank])
    dtype = checks.check_linear(*head)
    return Shard(group, sizes, start, start + sizes[rank], dtype, chunk_bytes)


def records_gradient(*values: Tensor | None) -> bool:
    """Whether there will be a backward pass for one of them; all ranks have to take part in it."""
    needs_grad = any(value is not None and value.requires_grad for value in values)
    return torch.is_grad_enabled() and needs_grad


def _targets(target: Tensor, ignore_index: int) -> tuple[int, int] | None:
    known = target[target != ignore_index]
    return (int(known.min()), int(known.max())) if len(known) else None


def _exchange(group: Any, check: Callable[[], _Found]) -> list[_Found]:
    """What all ranks found; where one fails or they disagree every rank raises, none waits."""
    if not dist.is_available():
        raise RuntimeError("group: this build of PyTorch has no torch.distributed")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that this process is a member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    problem: Exception | None = None
    mine: _Found | str
    try:
        mine = check()
    except Exception as error:  # whatever it is, the others wait to hear of it
        problem, mine = error, str(error)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if problem is not None:
        raise problem
    for rank, found in enumerate(everyone):
        if isinstance(found, str):
            raise ValueError(f"rank {rank} of group: {found}")
    for name in everyone[0].same:
        values = [found.same.get(name) for found in everyone]
        if any(value != values[0] for value in values):
            raise ValueError(f"{name}: expected the same on every rank of group, got {values}")
    return everyone


def sums_over_ranks(
    shard: Shard,
    head: tuple[Tensor, Tensor, Tensor | None],
    label: Tensor,
    with_sums: bool,
) -> RowSums:
    """The sums of whole rows, from those of each rank; ``label`` is a class of all."""
    input, weight, bias = head
    if len(weight):
        shape = tile_shape(input, weight, shard.dtype, shard.chunk_bytes)
        local = shard.local(label)
        values, classes = head_sums(input, weight, bias, local, shard.dtype, shape, with_sums)
        classes = torch.where(classes < 0, classes, classes + shard.start)
    else:
        values = input.new_zeros((len(input), 6), dtype=result_dtype(input.dtype))
        values[:, :2] = -torch.inf
        classes = label.new_full((len(input), 2), -1)
    parts = zip(shard.gather(values), shard.gather(classes), strict=True)
    return merge([RowSums(*part) for part in parts])
