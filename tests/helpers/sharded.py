"""DTensors and sharded models in a group of one process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@contextmanager
def one_process() -> Iterator[DeviceMesh]:
    """A device mesh of this process only."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


def distributed_tensor(value: Tensor, mesh: DeviceMesh) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor

    return distribute_tensor(value, mesh, [Replicate()])


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    return fully_shard(model, mesh=mesh)
