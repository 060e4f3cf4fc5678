"""The progress of a training: what it saw, and how far it is, saved and restored as one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..ops.statistics import SampleStatistics
from .dynamics.training_dynamics import TrainingDynamics
from .recording.recorder import RunRecorder
from .samplers.dynamics_sampler import DynamicsSampler

_VERSION = 1


class TrainingProgress:
    """Dynamics and sampler of one training, with the position in the current epoch.

    A loop tells it of every batch. It counts what all processes consumed, so its state resumes in
    the middle of an epoch, also on another number of processes. It follows the protocol
    ``state_dict`` / ``load_state_dict``.

    Args:
        sampler: A :class:`marginops.training.MarginSampler` or
            :class:`marginops.training.ReductionSampler`, or None if the loader has another sampler.
        dynamics: The dynamics of a training without ``sampler``. With one, they are its own.
        recorder: A :class:`marginops.training.RunRecorder` of the same dynamics. Every update then
            goes through it, and its state is a part of the state.
        group: The processes that share the samples of an epoch. The default is all processes, and
            one if ``torch.distributed`` is not initialised.

    Attributes:
        dynamics: What the training saw of every sample.
        sampler: The sampler, or None.
        recorder: The recorder, or None.
        epoch: The number of the current epoch.
        position: How many samples of this epoch all processes together have consumed.
    """

    def __init__(
        self,
        sampler: DynamicsSampler | None = None,
        *,
        dynamics: TrainingDynamics | None = None,
        recorder: RunRecorder | None = None,
        group: Any = None,
    ) -> None:
        if sampler is None and dynamics is None and recorder is None:
            raise TypeError("sampler: expected a sampler, dynamics or a recorder, got None for all")
        self.sampler, self.recorder = sampler, recorder
        owner = recorder if dynamics is None and sampler is None else sampler
        self.dynamics: TrainingDynamics = dynamics if owner is None else owner.dynamics  # type: ignore[assignment]
        if recorder is not None and recorder.dynamics is not self.dynamics:
            raise ValueError(
                "recorder: expected a recorder of the same dynamics, got one of others; pass "
                "sampler.dynamics to RunRecorder"
            )
        self.group = group
        self.epoch = 0
        self.position = 0

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on with that of a loaded state. A collective call."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0
        if self.sampler is not None:
            self._sync()
            self.sampler.set_epoch(epoch)

    def update(self, indices: Tensor, logits: Tensor, target: Tensor) -> SampleStatistics:
        """Note a batch in the dynamics, and advance by its samples."""
        statistics = (self.recorder or self.dynamics).update(indices, logits, target)
        self.advance(indices.numel())
        return statistics

    def advance(self, count: int) -> None:
        """Count samples that the loader handed to this process."""
        self.position += count * self._num_processes()

    def state_dict(self) -> dict[str, Any]:
        """The state of everything, the same on all processes. A collective call."""
        self._sync()
        position, sampler = self.position, None
        if self.sampler is not None:
            sampler = self.sampler.state_dict(min(position, self.sampler.epoch_size))
        return {
            "version": _VERSION,
            "epoch": self.epoch,
            "position": position,
            "dynamics": self.dynamics.state_dict(),
            "sampler": sampler,
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state. If it does not fit, everything stays as it was."""
        before = self.dynamics.state_dict()
        self.dynamics.load_state_dict(state_dict["dynamics"])
        try:
            if self.sampler is not None:
                self.sampler.load_state_dict(state_dict["sampler"])
            if self.recorder is not None:
                self.recorder.load_state_dict(state_dict["recorder"])
        except Exception:
            self.dynamics.load_state_dict(before)
            raise
        self.epoch, self.position = state_dict["epoch"], state_dict["position"]

    def _sync(self) -> None:
        if self._num_processes() > 1:
            if self.recorder is None:
                self.dynamics.sync(self.group)
            else:
                self.recorder.sync()

    def _num_processes(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)
