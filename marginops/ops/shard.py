"""A linear head whose classes are spread over the processes of a group.

A shard is the part of the head that one rank holds: the weight rows of a range of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from .class_sum import sum_pairs
from .linear_head import head_sums
from .row_sums import NOT_IN_PIECE, RowSums, classes_in_piece, merge
from .tiles import check_chunk_bytes, tile_shape


@dataclass(frozen=True)
class Shard:
    """The classes [start, stop) of this rank, and how it computes their logits.

    Attributes:
        group: The processes that share the head.
        sizes: The number of classes of every rank.
        start: The first class of this rank.
        stop: The class after the last one of this rank.
        dtype: The dtype of the matrix product; None for the dtype of the arguments.
        chunk_bytes: The size of the buffer for logits in bytes; None for the default.
    """

    group: dist.ProcessGroup
    sizes: list[int]
    start: int
    stop: int
    dtype: torch.dtype | None
    chunk_bytes: int | None

    @property
    def classes(self) -> slice:
        """The range of this rank's classes among all classes."""
        return slice(self.start, self.stop)

    def local(self, classes: Tensor) -> Tensor:
        """Number classes from the start of this rank. Other ranks' become NOT_IN_PIECE."""
        return classes_in_piece(classes, self.classes)

    def gather(self, value: Tensor) -> Tensor:
        """``[R, ...]``: the tensors of all R ranks."""
        parts = [torch.empty_like(value) for _ in self.sizes]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, rounded once to the dtype of ``value``."""
        total = value.to(result_dtype(value.dtype), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(value.dtype)

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """Rows of the whole weight, the same on every rank.

        Each row is a sum over ranks. It is exact, because all ranks but one add 0.
        """
        local = self.local(classes)
        rows = weight.new_zeros((len(classes), *weight.shape[1:]))
        is_local = (local != NOT_IN_PIECE).nonzero().squeeze(1)
        rows[is_local] = weight[local[is_local]]
        return self.sum(rows)

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """See :func:`class_sum.sum_pairs`; for the ``count`` classes of this rank."""
        local = self.local(pair)
        kept = (local.t().flatten() != NOT_IN_PIECE).nonzero().squeeze(1)
        return sum_pairs(value, rows, local, count, kept)


@dataclass(frozen=True)
class RankArguments:
    """What a rank tells the other ranks about its arguments.

    Attributes:
        must_agree: Properties that have to be the same on all ranks, by name.
    """

    must_agree: dict[str, Any]


Arguments = TypeVar("Arguments", bound=RankArguments)


@dataclass(frozen=True)
class _HeadArguments(RankArguments):
    """What a rank tells the other ranks about its part of the head and its targets.

    Attributes:
        classes: The number of classes of the rank.
        targets: The smallest and the largest target; None without targets.
    """

    classes: int
    targets: tuple[int, int] | None


def open_shard(
    function: str,
    head: tuple[Any, Any, Any],
    chunk_bytes: Any,
    group: Any,
    check: Callable[[], dict[str, Any]],
    labels: tuple[Any, Any] | None = None,
    or_more: bool = False,
) -> Shard:
    """Check the arguments of all ranks. If the arguments of one are wrong, every rank raises.

    Args:
        function: The name of the function, which has to be the same on all ranks.
        head: Features, weight and bias.
        chunk_bytes: The size of the buffer for logits in bytes, or None.
        group: The processes that share the head.
        check: Checks all further arguments. Returns the properties that have to be the same on
            all ranks.
        labels: Targets and ``ignore_index``; None if the function has no targets.
        or_more: Whether the features may be [..., N, D].
    """
    input, weight, bias = head
    if torch._C._are_functorch_transforms_active():
        # Not part of the exchange below, which does not work inside the transforms either.
        raise NotImplementedError(
            "group: expected None inside the transforms of torch.func such as grad and vmap, "
            f"got {group}; use backward()"
        )

    def check_all() -> _HeadArguments:
        dtype = checks.check_linear(input, weight, bias, or_more)
        check_chunk_bytes(chunk_bytes, weight, dtype)
        others = check()
        must_agree = {
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
        targets = None if labels is None else _targets(*labels)
        return _HeadArguments(must_agree, len(weight), targets)

    all_ranks = exchange(group, check_all)
    sizes = [arguments.classes for arguments in all_ranks]
    total = sum(sizes)
    if total < 2:
        raise ValueError(f"weight: expected at least 2 classes on all ranks of group, got {sizes}")
    for rank, arguments in enumerate(all_ranks):
        low, high = arguments.targets or (0, 0)
        if low < 0 or high >= total:
            raise RuntimeError(
                f"target: expected classes in [0, {total}) or ignore_index, "
                f"got {low if low < 0 else high} on rank {rank} of group"
            )
    rank = dist.get_rank(group)
    start = sum(sizes[:rank])
    dtype = checks.check_linear(*head, or_more)
    return Shard(group, sizes, start, start + sizes[rank], dtype, chunk_bytes)


def records_gradient(*values: Tensor | None) -> bool:
    """Whether autograd records a gradient of one of the tensors.

    All ranks have to agree, because all ranks have to take part in the backward pass.
    """
    needs_grad = any(value is not None and value.requires_grad for value in values)
    return torch.is_grad_enabled() and needs_grad


def _targets(target: Tensor, ignore_index: int) -> tuple[int, int] | None:
    """The smallest and the largest target that is not ignored; None if there is none."""
    kept = target[target != ignore_index]
    return (int(kept.min()), int(kept.max())) if len(kept) else None


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


def sums_over_ranks(
    shard: Shard,
    head: tuple[Tensor, Tensor, Tensor | None],
    label: Tensor,
    with_sums: bool,
) -> RowSums:
    """The :class:`RowSums` of whole rows. ``label`` is numbered over the classes of all ranks."""
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
