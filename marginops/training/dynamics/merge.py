"""The dynamics of several runs or ranks as one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.dynamics import VALUES, DynamicsState
from .values import DynamicsValues

_LAST_ROW = 2**32 - 1
_CHUNK = 2**20  # samples whose records are in temporary memory at a time
_AVERAGE = VALUES.index("margin_average")
_MEANS = [VALUES.index(name) for name in ("margin_mean", "confidence_mean", "el2n_mean")]
_CONFIDENCE, _M2 = VALUES.index("confidence_mean"), VALUES.index("confidence_m2")


def merge(dynamics: DynamicsValues, other: DynamicsValues) -> None:
    """Add the visits of ``other``; see :meth:`TrainingDynamics.merge`."""
    for name in ("num_samples", "decay"):
        own, theirs = getattr(dynamics, name), getattr(other, name)
        if own != theirs:
            raise ValueError(f"other: expected {name} {own} as these dynamics, got {theirs}")
    if other is dynamics:
        raise ValueError(
            "other: expected other dynamics, got these, whose visits would count twice"
        )
    for own_rows, their_rows in zip(_chunks(dynamics), _chunks(other), strict=True):
        _merge_rows(own_rows, DynamicsState(*(rows.to(dynamics.device) for rows in their_rows)))
    own_totals, totals = dynamics._state.totals, other._state.totals.to(dynamics.device)
    own_totals.copy_(torch.stack((torch.maximum(own_totals, totals)[0], (own_totals + totals)[1])))


def _chunks(dynamics: DynamicsValues) -> Iterator[DynamicsState]:
    """Views of the records of some samples at a time."""
    values, counts, last_seen, totals = dynamics._state
    for start in range(0, dynamics.num_samples, _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield DynamicsState(values[rows], counts[rows], last_seen[rows], totals)


def _merge_rows(one: DynamicsState, other: DynamicsState) -> None:
    """Merge records into ``one``. Between equal steps those of ``other`` are the earlier ones."""
    is_newer = other.last_seen >> 32 > one.last_seen >> 32
    count, more = one.counts[:, 0], other.counts[:, 0]
    both = (count > 0) & (more > 0)
    # Visits with values that are not finite change neither counts nor means.
    is_later = torch.where(both, is_newer, more > 0)

    share = (more / (count + more).clamp(min=1)).double()
    values = one.values.double()
    step = other.values.double() - values
    values[:, _MEANS] += step[:, _MEANS] * share.unsqueeze(1)
    values[:, _M2] = one.values[:, _M2].double() + other.values[:, _M2]
    values[:, _M2] += step[:, _CONFIDENCE].square() * share * count
    one.values[:, :_AVERAGE].copy_(
        torch.where(is_newer.unsqueeze(1), other.values[:, :_AVERAGE], one.values[:, :_AVERAGE])
    )
    one.values[:, _AVERAGE].copy_(
        torch.where(is_later, other.values[:, _AVERAGE], one.values[:, _AVERAGE])
    )
    one.values[:, _AVERAGE + 1 :].copy_(values[:, _AVERAGE + 1 :])

    was_correct, is_correct = _is_correct(one.counts), _is_correct(other.counts)
    earlier = torch.where(is_later, was_correct, is_correct)
    later = torch.where(is_later.unsqueeze(1), other.counts, one.counts)
    # The state does not tell whether the first of the later visits was correct. It certainly was if
    # each visit that was not correct forgot the sample; else take it to be as the last one.
    begins_correct = _is_correct(later) | (later[:, 0] - later[:, 1] == later[:, 3])
    one.counts.add_(other.counts)
    # The later visits were counted as if the sample had not been correct before.
    one.counts[:, 2].sub_((both & earlier & begins_correct).int())
    one.counts[:, 3].add_((both & earlier & ~begins_correct).int())
    one.last_seen.copy_(torch.maximum(one.last_seen, other.last_seen))


def _is_correct(counts: Tensor) -> Tensor:
    """Whether a sample was correct at its last visit."""
    return counts[:, 2] > counts[:, 3]


def sync(dynamics: DynamicsValues, group: Any) -> None:
    """Give all ranks the newest record of each sample; see :meth:`TrainingDynamics.sync`."""
    if not dist.is_available() or (group is None and not dist.is_initialized()):
        return
    if group is not None:
        check_group(group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    totals = _check_ranks(dynamics, group, ranks)
    device = collective_device(dynamics, group)
    for rows in _chunks(dynamics):
        _sync_rows(rows, group, ranks, rank, device)
    state, common = dynamics._state, dynamics._common_nonfinite
    state.totals[0] = max(steps for steps, _ in totals)
    state.totals[1] = common + sum(nonfinite - common for _, nonfinite in totals)
    dynamics._common_nonfinite = dynamics.num_nonfinite


def check_group(group: Any) -> None:
    """Check that this process is a member of a process group."""
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that this process is a member of")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )


def _check_ranks(dynamics: DynamicsValues, group: Any, ranks: int) -> list[list[int]]:
    """Check that all ranks have the same arguments, on all ranks; returns their totals."""
    names = "num_samples", "decay", "weights_version", "_common_nonfinite"
    own = {name: getattr(dynamics, name) for name in names}
    answers: list[Any] = [None] * ranks
    dist.all_gather_object(answers, (own, dynamics._state.totals.tolist()), group=group)
    for name in names:
        values = [arguments[name] for arguments, _ in answers]
        if any(value != values[0] for value in values):
            if name == "_common_nonfinite":
                raise ValueError(
                    "group: expected ranks that all took part in the last sync, or loaded the "
                    "same state; call sync before state_dict, and load one state on all ranks"
                )
            raise ValueError(f"{name}: expected the same on every rank of group, got {values}")
    return [totals for _, totals in answers]


def collective_device(dynamics: DynamicsValues, group: Any) -> torch.device:
    """The device of the state if the group can communicate from there, else the GPU."""
    config = str(dist.get_backend_config(group))
    if dynamics.device.type in config:
        return dynamics.device
    return (
        torch.device("cuda", torch.cuda.current_device()) if "cuda" in config else dynamics.device
    )


def _sync_rows(
    rows: DynamicsState, group: Any, ranks: int, rank: int, device: torch.device
) -> None:
    """Find the rank with the newest record of each sample, and take the record from there.

    All other ranks send zeros, so the sum of integers is the record, bit for bit.
    """
    step = rows.last_seen >> 32
    key = (step * ranks + (ranks - 1 - rank)).to(device)
    newest = key.clone()
    dist.all_reduce(newest, dist.ReduceOp.MAX, group=group)
    record = torch.cat((rows.values.view(torch.int32), rows.counts), 1).to(device)
    record[key != newest] = 0
    dist.all_reduce(record, dist.ReduceOp.SUM, group=group)
    columns = rows.values.shape[1]
    rows.values.view(torch.int32).copy_(record[:, :columns])
    rows.counts.copy_(record[:, columns:])
    step.copy_(newest.div_(ranks, rounding_mode="floor"))
    # The row of the last visit differs between ranks and means nothing after its update.
    rows.last_seen.copy_(step.bitwise_left_shift_(32).bitwise_or_(_LAST_ROW))
