"""A linear head whose weight is a DTensor: each process of its mesh holds the rows of some classes.

Such a head is what tensor parallelism over classes makes. Its local rows and the group of its mesh
are what :mod:`shard` takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from .exchange import RankArguments, exchange

_PROJECTIONS = 8
_TOLERANCE = 0.02


def local_head(
    input: Any, weight: Any, bias: Any, group: Any, target: Any = None
) -> tuple[Any, Any, Any, Any, Any]:
    """Take the local part of the arguments if the weight is a DTensor.

    Returns:
        Input, weight, bias, group and target for a function with ``group=``. They stay as they are
        if the weight is no DTensor.

    Raises:
        TypeError, ValueError: A DTensor has other placements, or the ranks have other samples. If
            one rank raises, all ranks raise.
    """
    if not _is_distributed(weight):
        return input, weight, bias, group, target
    mesh = weight.device_mesh
    if mesh.ndim != 1 or not _is_sharded_by_rows(weight):
        raise TypeError(
            "weight: expected an ordinary tensor or a DTensor with placements (Shard(dim=0),) on "
            f"a mesh of one dimension, got a DTensor with {_layout(weight)}; pass "
            "weight.full_tensor()"
        )
    if group is not None:
        raise TypeError(
            "group: expected None for a weight that is a DTensor, because its mesh has the group, "
            f"got {type(group).__name__}; leave out group"
        )

    def check() -> _Samples:
        for name, value in (("input", input), ("target", target)):
            if _is_distributed(value) and not _is_replicated(value, mesh):
                raise TypeError(
                    f"{name}: expected an ordinary tensor or a DTensor that is replicated on the "
                    f"mesh of weight, got a DTensor with {_layout(value)}; pass "
                    f"{name}.full_tensor()"
                )
        shards = _is_distributed(bias) and bias.device_mesh == mesh and _is_sharded_by_rows(bias)
        if bias is not None and not shards:
            got = (
                f"a DTensor with {_layout(bias)}" if _is_distributed(bias) else type(bias).__name__
            )
            raise TypeError(
                f"bias: expected a DTensor that is sharded as weight, got {got}; pass "
                "distribute_tensor(bias, weight.device_mesh, weight.placements)"
            )
        return _samples(_local(input), _local(target))

    all_ranks = exchange(mesh.get_group(), check)
    for rank, other in enumerate(all_ranks):
        if name := all_ranks[0].difference(other):
            raise ValueError(
                f"{name}: expected the same samples on every rank of the mesh of weight, got "
                f"others on rank {rank} than on rank 0; where each rank has its own samples, as "
                "under FSDP, pass weight.full_tensor()"
            )
    local_bias = None if bias is None else bias.to_local()
    return _local(input), weight.to_local(), local_bias, mesh.get_group(), _local(target)


def _is_distributed(value: Any) -> bool:
    return isinstance(value, Tensor) and checks.is_distributed(value)


def _local(value: Any) -> Any:
    """The whole tensor of a replicated DTensor, which needs no communication."""
    return value.full_tensor() if _is_distributed(value) else value


def _is_sharded_by_rows(value: Any) -> bool:
    from torch.distributed.tensor import Shard

    # Subclasses of Shard order the rows in another way.
    return (
        len(value.placements) == 1
        and type(value.placements[0]) is Shard
        and (value.placements[0].dim == 0)
    )


def _is_replicated(value: Any, mesh: Any) -> bool:
    return value.device_mesh == mesh and all(each.is_replicate() for each in value.placements)


def _layout(value: Any) -> str:
    return f"placements {value.placements} on a mesh of shape {[*value.device_mesh.shape]}"


@dataclass(frozen=True)
class _Samples(RankArguments):
    """Numbers that tell samples apart, although their rounding may differ between ranks.

    Attributes:
        target: A sum over the targets, in which each place has a factor of its own.
        size: The norm of the features.
        projections: Sums over the features, in which each place has a factor of its own.
    """

    target: int | None
    size: float
    projections: list[float]

    def difference(self, other: _Samples) -> str | None:
        """The argument that differs by more than rounding; None if the samples are the same."""
        if None not in (self.target, other.target) and self.target != other.target:
            return "target"
        # Other checks find out what is wrong with arguments of the wrong kind.
        steps = zip(self.projections, other.projections, strict=False)
        largest = max((abs(one - two) for one, two in steps), default=0.0)
        return "input" if largest > _TOLERANCE * self.size else None


@torch.no_grad()
def _samples(input: Any, target: Any) -> _Samples:
    """Without features and targets of the right kinds there is nothing to compare."""
    total = None
    if isinstance(target, Tensor) and not target.is_floating_point():
        places = torch.arange(1, target.numel() + 1, device=target.device)
        total = int((target.flatten() * places).sum())
    if not isinstance(input, Tensor) or input.dim() < 2 or not input.is_floating_point():
        return _Samples({}, total, 0.0, [])
    rows = input.detach().flatten(0, -2)

    def factors(count: int) -> Tensor:
        steps = torch.arange(1, _PROJECTIONS + 1, device=rows.device)
        return (torch.arange(count, device=rows.device).unsqueeze(1) * steps).cos().to(rows.dtype)

    wide = checks.result_dtype(rows.dtype)
    sums = factors(rows.shape[0]).to(wide) * (rows @ factors(rows.shape[1])).to(wide)
    size = torch.linalg.vector_norm(rows, dtype=wide)
    return _Samples({}, total, size.item(), sums.sum(0).tolist())
