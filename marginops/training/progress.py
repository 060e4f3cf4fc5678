"""The progress of a training: what it saw, and how far it is, saved and restored as one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from .. import _checks as checks
from ..ops.statistics import SampleStatistics
from .dynamics.merge import check_group
from .dynamics.training_dynamics import TrainingDynamics
from .progress_state import VERSION, check_state
from .recording.recorder import RunRecorder
from .samplers.agreement import together
from .samplers.dynamics_sampler import DynamicsSampler, check_dynamics
from .samplers.epoch_sampler import EpochSampler, check_epoch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TrainingProgress:
    """Dynamics and sampler of one training, with the position in the current epoch.

    A loop tells it of every batch. It counts what all processes consumed, so its state resumes in
    the middle of an epoch, also on another number of processes. It follows the protocol
    ``state_dict`` / ``load_state_dict``.

    Args:
        sampler: A :class:`marginops.training.MarginSampler`, a
            :class:`marginops.training.ReductionSampler` or a
            :class:`marginops.training.WeightedSampler`. None, if the loader has another sampler.
        dynamics: The dynamics of a training whose sampler has none. A ``MarginSampler`` and a
            ``ReductionSampler`` bring their own, and so does a recorder.
        recorder: A :class:`marginops.training.RunRecorder` of the same dynamics. Every update then
            goes through it, and its state is a part of the state.
        group: The processes that share the samples of an epoch. The default is the group of the
            sampler; if it has none, all processes of ``torch.distributed``, or this one alone if
            that is not initialised.
        fingerprint: A text that names the data set, for example a checksum of its labels. The state
            keeps it, and a state with another fingerprint is refused. A state without fingerprint
            is not compared.

    Attributes:
        dynamics: What the training saw of every sample.
        sampler: The sampler, or None.
        recorder: The recorder, or None.
        epoch: The number of the current epoch.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or the arguments do not go together.

    The sampler may divide an epoch among the ranks itself (``group=``), or leave this to the loader
    (``num_replicas=1``), as for accelerate. All ranks have to consume equally many samples at each
    step. An epoch takes one sync of the dynamics, and a state another one. :meth:`update` waits
    for nothing.

    Example:
        >>> import torch
        >>> from marginops.training import MarginSampler, TrainingDynamics, TrainingProgress
        >>> inputs, target = torch.eye(4).repeat(3, 1), torch.arange(4).repeat(3)
        >>> network, epochs = torch.nn.Linear(4, 4), 3
        >>> progress = TrainingProgress(MarginSampler(TrainingDynamics(12), num_samples=6))
        >>> for epoch in range(progress.next_epoch, epochs):
        ...     progress.begin_epoch(epoch)
        ...     for indices in progress.sampler.indices().split(2):
        ...         logits = network(inputs[indices])
        ...         loss = progress.update(indices, logits, target[indices]).mean_loss()
        >>> progress.epoch, progress.position, progress.next_epoch
        (2, 6, 3)
        >>> state = progress.state_dict()
        >>> resumed = TrainingProgress(MarginSampler(TrainingDynamics(12), num_samples=6))
        >>> resumed.load_state_dict(state)
        >>> resumed.next_epoch, int(resumed.dynamics.count.sum())
        (3, 18)
    """

    def __init__(
        self,
        sampler: EpochSampler | None = None,
        *,
        dynamics: TrainingDynamics | None = None,
        recorder: RunRecorder | None = None,
        group: ProcessGroup | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if sampler is not None and not isinstance(sampler, EpochSampler):
            raise TypeError(
                "sampler: expected a MarginSampler, a ReductionSampler, a WeightedSampler or None, "
                f"got {type(sampler).__name__}; without a sampler of these pass dynamics="
            )
        if fingerprint is not None and not isinstance(fingerprint, str):
            raise TypeError(f"fingerprint: expected a str, got {type(fingerprint).__name__}")
        if recorder is not None and not isinstance(recorder, RunRecorder):
            raise TypeError(f"recorder: expected a RunRecorder, got {type(recorder).__name__}")
        if dynamics is None and recorder is not None and not isinstance(sampler, DynamicsSampler):
            dynamics = recorder.dynamics
        self.sampler, self.recorder = sampler, recorder
        self.dynamics = _dynamics_of(sampler, dynamics)
        if recorder is not None and recorder.dynamics is not self.dynamics:
            raise ValueError(
                "recorder: expected a recorder of the same dynamics, got one of others; pass "
                "sampler.dynamics to RunRecorder"
            )
        self.fingerprint = fingerprint
        samplers_group = getattr(sampler, "group", None)
        if group is not None:
            check_group(group)
        if group is not None and samplers_group not in (None, group):
            raise ValueError(
                "group: expected None or the group of the sampler, got another group; all parts of "
                "a training share the samples of an epoch among the same processes"
            )
        self._own_group = samplers_group if group is None else group
        self.epoch = 0 if sampler is None else sampler.epoch
        self._start = 0 if sampler is None else sampler.position
        self._consumed = 0

    @property
    def position(self) -> int:
        """How many samples of this epoch all processes together have consumed.

        Padding at the end of an epoch does not count. The other processes count as much as this
        one; only :meth:`state_dict` asks them.
        """
        return self._within_epoch(self._start + self._consumed * self._num_processes)

    @property
    def next_epoch(self) -> int:
        """The epoch with which a loop begins or goes on.

        It is the current epoch, or the next one if all samples of the current one are consumed.
        Without a sampler, an epoch has as many samples as the data set.
        """
        size = self.dynamics.num_samples if self.sampler is None else self.sampler.epoch_size
        return self.epoch + (self.position >= size)

    def begin_epoch(self, epoch: int) -> None:
        """Begin an epoch, or go on with the epoch of a loaded state at its position.

        This is a collective call. It takes the place of ``sampler.set_epoch``, and syncs the
        dynamics before the sampler reads them. If one rank has an error or an argument differs, all
        ranks get an error.

        Args:
            epoch: The number of the epoch, 0 <= epoch < 2**63.
        """
        group, sampler = self._group, self.sampler
        together(group, self._check_replicas, lambda _: self._facts())
        if sampler is None:
            together(group, lambda: check_epoch(epoch), lambda _: {"epoch": epoch})
            self._start = self._start if epoch == self.epoch else 0
        else:
            sampler._begin_epoch(epoch, group)
            self._start = sampler.position
        self.epoch, self._consumed = int(epoch), 0

    def update(self, indices: Tensor, logits: Tensor, target: Tensor) -> SampleStatistics:
        """Note a batch in the dynamics, and count its samples.

        Args:
            indices: As for :meth:`TrainingDynamics.update`, and so are the next arguments.
            logits: ``[B, C]``.
            target: ``[B]`` int64.

        Returns:
            :class:`marginops.SampleStatistics`. Its ``mean_loss()`` is the loss for training.

        Raises:
            TypeError, ValueError, RuntimeError: As :meth:`TrainingDynamics.update`. A ValueError
                too if the whole epoch is consumed already, or if the sampler is in another epoch.
        """
        self._check_epoch_of_sampler()
        self._check_rest()
        statistics = (self.recorder or self.dynamics).update(indices, logits, target)
        self._consumed += indices.numel()
        return statistics

    def advance(self, count: int) -> None:
        """Count samples that the loader handed to this process.

        It is for loops that train on fewer samples than the loader hands out, or compute the
        statistics themselves. They call ``record`` of the recorder or of the dynamics beside it.

        Args:
            count: How many samples the loader handed to this process, without those of other
                processes.
        """
        checks.check_int("count", count, 0)
        self._check_epoch_of_sampler()
        if count > 0:
            self._check_rest()
        self._consumed += int(count)

    def state_dict(self) -> dict[str, Any]:
        """The state of everything, the same on all ranks.

        This is a collective call, which syncs the dynamics. So all ranks call it, and one of them
        saves the state.

        Returns:
            Numbers, texts and tensors; ``torch.load(..., weights_only=True)`` reads them.

        Raises:
            ValueError: On all ranks: the sampler is in another epoch, or the ranks consumed
                different numbers of samples within an epoch, so no position tells what is left.
        """
        position = self._position_of_all()
        self._sync()
        return {
            "version": VERSION,
            "epoch": self.epoch,
            "position": position,
            "fingerprint": self.fingerprint,
            "dynamics": self.dynamics.state_dict(),
            "sampler": None if self.sampler is None else self.sampler.state_dict(position),
            "recorder": None if self.recorder is None else self.recorder.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state was made. Every rank loads the same state.

        Args:
            state_dict: The result of :meth:`state_dict`, also one of another number of ranks.

        Raises:
            TypeError, ValueError: The state is damaged, or of another data set, or of dynamics or a
                sampler with other arguments. Everything stays as it was.
        """
        check_state(state_dict, self.dynamics, self.sampler, self.recorder, self.fingerprint)
        self.dynamics.load_state_dict(state_dict["dynamics"])
        if self.sampler is not None:
            self.sampler.load_state_dict(state_dict["sampler"])
        if self.recorder is not None:
            self.recorder.load_state_dict(state_dict["recorder"])
        self.epoch, self._start, self._consumed = state_dict["epoch"], state_dict["position"], 0

    def _position_of_all(self) -> int:
        """The number of consumed samples on all ranks. A collective call."""
        group = self._group
        together(group, self._check_epoch_of_sampler, lambda _: self._facts())
        if group is None:
            return self.position
        counts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(counts, self._consumed, group=group)
        position = self._start + sum(counts)
        if self.sampler is None:
            return position
        # At the end of an epoch the ranks may differ, because nothing is left to divide.
        if len(set(counts)) > 1 and position < self.sampler.epoch_size:
            raise ValueError(
                "position: expected the same number of consumed samples on all ranks, got "
                f"{', '.join(map(str, counts))} on the ranks 0 to {len(counts) - 1}; give all "
                "ranks batches of one size"
            )
        return self._within_epoch(position)

    def _check_epoch_of_sampler(self) -> None:
        sampler = self.sampler
        if sampler is None or (sampler.epoch, sampler.position) == (self.epoch, self._start):
            return
        raise ValueError(
            f"epoch: expected the sampler in epoch {self.epoch} from position {self._start} on, "
            f"got epoch {sampler.epoch} and position {sampler.position}; call begin_epoch before "
            "the loop over the loader, and let nobody set another epoch (with accelerate, call "
            "loader.set_epoch(epoch) after it)"
        )

    def _check_rest(self) -> None:
        """Check that something is left of the epoch: padding comes with the last samples."""
        if self.sampler is not None and self.position >= self.sampler.epoch_size:
            raise ValueError(
                f"position: expected at most {self.sampler.epoch_size} samples in epoch "
                f"{self.epoch} on all ranks, got more; call begin_epoch before each epoch, "
                "and let either the sampler (group=) or the loader divide an epoch among the ranks"
            )

    def _check_replicas(self) -> None:
        count = self._num_processes
        if self.sampler is not None and self.sampler.num_replicas not in (1, count):
            expected = "1" if count == 1 else f"1 or {count}"
            raise ValueError(
                f"sampler: expected num_replicas {expected}, because so many processes share an "
                f"epoch, got {self.sampler.num_replicas}; pass group= to the sampler, or "
                "num_replicas=1 if the loader divides the epoch"
            )

    def _facts(self) -> dict[str, int]:
        """What has to be equal on all ranks."""
        return {"current epoch": self.epoch, "position at its beginning": self._start}

    def _within_epoch(self, position: int) -> int:
        return position if self.sampler is None else min(position, self.sampler.epoch_size)

    def _sync(self) -> None:
        if self._group is None:
            return
        if self.recorder is None:
            self.dynamics.sync(self._group)
        else:
            self.recorder.sync()

    @property
    def _group(self) -> ProcessGroup | None:
        """The group of several processes; None for one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self._own_group is None else self._own_group
        return group if dist.get_world_size(group) > 1 else None

    @property
    def _num_processes(self) -> int:
        return 1 if self._group is None else dist.get_world_size(self._group)


def _dynamics_of(sampler: EpochSampler | None, dynamics: Any) -> TrainingDynamics:
    """The dynamics of the sampler, or those of a training whose sampler has none."""
    if isinstance(sampler, DynamicsSampler):
        if dynamics not in (None, sampler.dynamics):
            raise ValueError(
                "dynamics: expected None or those of the sampler, got others, which the sampler "
                "would not see"
            )
        return sampler.dynamics
    if dynamics is None:
        kind = "None" if sampler is None else type(sampler).__name__
        raise TypeError(
            f"dynamics: expected TrainingDynamics with sampler {kind}, got None; pass them, or a "
            "MarginSampler"
        )
    check_dynamics(dynamics)
    if sampler is not None and sampler.population != dynamics.num_samples:
        raise ValueError(
            f"dynamics: expected {sampler.population} samples, as many as the sampler has, got "
            f"{dynamics.num_samples}"
        )
    return dynamics
