"""A linear head whose classes are spread over the processes of a group.

Each rank holds the weight rows of a range of classes and computes the :class:`RowSums` of these.
The ranks exchange the sums. Then every rank merges them and computes the results of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import result_dtype
from . import margin_pair as pairs
from .class_sum import ScaledRows, sum_pairs
from .exchange import RankArguments, exchange
from .linear_head import LinearHead, Place
from .row_sums import NOT_IN_PIECE, RowSums, classes_in_piece, merge
from .tiles import CPU_CHUNK_BYTES

# How many bytes of rows of the weight the ranks exchange at most at once. All ranks need the same
# number.
_EXCHANGED_BYTES = CPU_CHUNK_BYTES


@dataclass(frozen=True)
class Shard(Place):
    """The place of a head with the classes [start, stop) on this rank.

    Attributes:
        group: The processes that share the head.
        sizes: The number of classes of every rank.
        start: The first class of this rank.
        stop: The class after the last one of this rank.
    """

    group: dist.ProcessGroup
    sizes: list[int]
    start: int
    stop: int

    def labels(self, head: LinearHead) -> tuple[Tensor, Tensor]:
        """The ranks have checked the targets together."""
        ignored = head.ignored
        return ignored, torch.where(ignored, 0, head.target)

    def row_sums(self, head: LinearHead, label: Tensor, with_sums: bool) -> RowSums:
        """Merge the sums of all ranks."""
        if len(head.weight):
            values, classes = head.local_sums(self.local(label), with_sums)
            classes = torch.where(classes < 0, classes, classes + self.start)
        else:
            values = head.input.new_zeros((len(label), 6), dtype=result_dtype(head.input.dtype))
            values[:, :2] = -torch.inf
            classes = label.new_full((len(label), 2), -1)
        parts = zip(self._gather(values), self._gather(classes), strict=True)
        return merge([RowSums(*part) for part in parts])

    def pair_distance(self, weight: Tensor, bias: Tensor | None, pair: Tensor) -> Tensor:
        """The ranks exchange the rows of a few pairs at a time."""
        row_bytes = max(weight.shape[1], 1) * result_dtype(weight.dtype).itemsize
        parts = []
        for part in pair.split(max(_EXCHANGED_BYTES // (2 * row_bytes), 1)):
            classes = part.flatten()
            pair_bias = None if bias is None else self.rows(bias, classes)
            index = torch.arange(len(classes), device=classes.device).view(-1, 2)
            parts.append(pairs.pair_distance_op(self.rows(weight, classes), pair_bias, index))
        return torch.cat(parts)

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """Each row is a sum over ranks. It is exact, because all ranks but one add 0."""
        local = self.local(classes)
        rows = weight.new_zeros((len(classes), *weight.shape[1:]))
        is_local = (local != NOT_IN_PIECE).nonzero().squeeze(1)
        rows[is_local] = weight[local[is_local]]
        return self.sum(rows)

    def local(self, classes: Tensor) -> Tensor:
        """Number classes from the start of this rank."""
        return classes_in_piece(classes, slice(self.start, self.stop))

    def sum_pairs(
        self, pair: Tensor, count: int, scaled_rows: Sequence[ScaledRows]
    ) -> list[Tensor]:
        """Leave out the classes of other ranks."""
        local = self.local(pair)
        kept = (local.t().flatten() != NOT_IN_PIECE).nonzero().squeeze(1)
        return sum_pairs(local, count, scaled_rows, kept)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, rounded once to the dtype of ``value``."""
        total = value.to(result_dtype(value.dtype), copy=True)
        dist.all_reduce(total, group=self.group)
        return total.to(value.dtype)

    def _gather(self, value: Tensor) -> list[Tensor]:
        """The tensors of all ranks."""
        parts = [torch.empty_like(value) for _ in self.sizes]
        dist.all_gather(parts, value.contiguous(), group=self.group)
        return parts


@dataclass(frozen=True)
class _HeadArguments(RankArguments):
    """What a rank tells the other ranks about its part of the head and its targets.

    Attributes:
        classes: The number of classes of the rank.
        targets: The smallest and the largest target; None without targets.
    """

    classes: int
    targets: tuple[int, int] | None


def open_shard(group: Any, check: Callable[[], LinearHead], **others: Any) -> LinearHead:
    """Check the arguments of all ranks. If those of one are wrong, every rank raises an error.

    Args:
        group: The processes that share the head.
        check: Checks the arguments of this rank.
        others: What else has to be the same on all ranks.

    Returns:
        The result of ``check`` with the place of its classes.
    """
    if torch._C._are_functorch_transforms_active():
        # Checked before the exchange below, which does not work inside the transforms.
        raise NotImplementedError(
            "group: expected None inside the transforms of torch.func such as grad and vmap, "
            f"got {group}; use backward()"
        )
    heads = []

    def check_and_describe() -> _HeadArguments:
        heads.append(check())
        return _describe(heads[0], others)

    all_ranks = exchange(group, check_and_describe)
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
    return heads[0]._replace(place=Shard(group, sizes, start, start + sizes[rank]))


def _describe(head: LinearHead, others: dict[str, Any]) -> _HeadArguments:
    input, weight, bias, target, log_norm, *_ = head
    must_agree = {
        **others,
        "input (shape, dtype, requires_grad)": [
            *head.shape,
            input.shape[1],
            str(input.dtype),
            _records_gradient(input),
        ],
        "weight (dtype)": str(weight.dtype),
        "bias (dtype)": None if bias is None else str(bias.dtype),
        "weight and bias (requires_grad)": _records_gradient(weight, bias),
        "autocast (dtype)": str(head.dtype),
        "ignore_index": head.ignore_index,
        "log_norm (is not None, requires_grad)": [
            log_norm is not None,
            _records_gradient(log_norm),
        ],
        "bias_in_norm": head.bias_in_norm,
        "k": head.k,
    }
    kept = None if target is None else target[target != head.ignore_index]
    targets = None if kept is None or not len(kept) else (int(kept.min()), int(kept.max()))
    return _HeadArguments(must_agree, len(weight), targets)


def _records_gradient(*values: Tensor | None) -> bool:
    """Whether autograd records a gradient of one of the tensors.

    All ranks have to agree, because all ranks have to take part in the backward pass.
    """
    needs_grad = any(value is not None and value.requires_grad for value in values)
    return torch.is_grad_enabled() and needs_grad
