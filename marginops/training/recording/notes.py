"""The label and the predicted class of every sample, as the training saw them last."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.statistics import SampleStatistics

_STEP_BITS = 32
_CLASS = 2**_STEP_BITS - 1


class SampleNotes:
    """Label and predicted class of N samples.

    Attributes:
        values: ``[N, 2]`` int64, ``step * 2**32 + class`` for the label and for the predicted
            class; 0 for a sample that was never seen. So the largest of several notes is the
            newest, and among those of one step that with the largest class.
        step: The number of the last step, from 1 on.
    """

    def __init__(self, num_samples: int, device: torch.device) -> None:
        self.values = torch.zeros(num_samples, 2, dtype=torch.int64, device=device)
        self.step = 0

    @property
    def labels(self) -> Tensor:
        """``[N]`` int32, -1 for a sample that was never seen."""
        return self._classes(0)

    @property
    def predictions(self) -> Tensor:
        """``[N]`` int32, -1 for a sample that was never seen."""
        return self._classes(1)

    @torch.no_grad()
    def add(self, indices: Tensor, statistics: SampleStatistics, target: Tensor) -> None:
        """Note a batch. Ignored samples stay as they were."""
        device = self.values.device
        predicted = torch.where(statistics.correct, target, statistics.rival)
        self.step += 1
        notes = torch.stack((target, predicted), 1).bitwise_or_(self.step << _STEP_BITS)
        notes = notes.where(statistics.counted.unsqueeze(1), 0)
        # A copy to the host has to be complete before the next line reads it.
        is_gpu = device.type == "cuda"
        rows = indices.to(device, non_blocking=is_gpu).unsqueeze(1).expand(-1, 2)
        notes = notes.to(device, non_blocking=is_gpu)
        self.values.scatter_reduce_(0, rows, notes, "amax")

    def sync(self, group: Any, device: torch.device) -> None:
        """Give all ranks the newest notes, by way of a device that the group can use."""
        values, step = self.values.to(device), torch.tensor([self.step], device=device)
        for value in (values, step):
            dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        self.values.copy_(values)
        self.step = int(step)

    def _classes(self, column: int) -> Tensor:
        notes = self.values[:, column]
        return torch.where(notes == 0, -1, notes & _CLASS).int()
