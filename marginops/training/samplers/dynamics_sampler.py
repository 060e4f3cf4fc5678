"""Samplers whose weights come from TrainingDynamics and stay in them."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from ..dynamics.merge import check_group
from ..dynamics.training_dynamics import TrainingDynamics
from .agreement import together
from .epoch_sampler import EpochSampler
from .weighted_sampler import check_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DynamicsSampler(EpochSampler):
    """A sampler that computes the weights of an epoch from dynamics, once and on all ranks."""

    def __init__(
        self,
        dynamics: TrainingDynamics,
        epoch_size: int,
        seed: int,
        num_replicas: int | None,
        rank: int | None,
        group: ProcessGroup | None,
        drop_last: bool,
    ) -> None:
        if group is not None:
            check_group(group)
        if num_replicas is None:
            num_replicas = 1 if group is None else dist.get_world_size(group)
        if rank is None:
            rank = 0 if group is None else dist.get_rank(group)
        super().__init__(dynamics.num_samples, epoch_size, seed, num_replicas, rank, drop_last)
        self.dynamics, self.group = dynamics, group
        self._loaded_version = -1
        self._adopted: Tensor | None = None

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: compute its weights, unless the dynamics hold them already.

        With ``group`` this is a collective call, which syncs the dynamics. If an argument differs
        between the ranks, or one rank has an error, all ranks get an error.

        Args:
            epoch: The number of the epoch, 0 <= epoch < 2**63. The epoch of a loaded state goes on
                at its position; every other epoch begins anew.
        """
        self._begin_epoch(epoch, self.group)

    def _begin_epoch(self, epoch: int, group: ProcessGroup | None) -> None:
        """Begin an epoch with the ranks of a group, whether or not the sampler has one."""
        begin = super().set_epoch
        together(group, lambda: begin(epoch), lambda _: self._facts())
        weights = together(group, lambda: self._weights_of_epoch(group), _checksum)
        self._adopt(weights)
        self._adopted = self.dynamics.weights = weights
        self.dynamics.weights_version = self.epoch

    def _drawn_weights(self) -> tuple[Tensor, int]:
        weights = self.dynamics.weights
        if self.dynamics.weights_version != self.epoch or weights is None:
            self._begin_epoch(self.epoch, self.group)
            weights = self.dynamics.weights
            assert weights is not None
        elif weights is not self._adopted:  # the dynamics were loaded after the sampler
            self._adopt(weights)
            self._adopted = weights
        return weights.cpu(), self.epoch

    def _version(self) -> int:
        return self.dynamics.weights_version

    def _load(self, epoch: int, position: int, version: int) -> None:
        if position > 0 and version != epoch:
            raise ValueError(
                f"state_dict: expected weights_version {epoch}, that of its epoch, got {version}"
            )
        self.epoch, self._position, self._loaded_version = epoch, position, version

    def _weights_of_epoch(self, group: ProcessGroup | None) -> Tensor:
        """The weights that the dynamics hold for the current epoch, or new ones."""
        dynamics = self.dynamics
        if dynamics.weights_version == self.epoch and dynamics.weights is not None:
            return dynamics.weights
        if self._loaded_version == self.epoch:
            raise ValueError(
                f"dynamics: expected the weights of epoch {self.epoch}, in which the loaded state "
                f"stopped, got those of epoch {dynamics.weights_version}; load the state of the "
                "dynamics that was saved with the state of the sampler"
            )
        if group is not None:
            dynamics.sync(group)
        return self._compute()

    def _adopt(self, weights: Tensor) -> None:
        """Take weights that the dynamics hold."""
        try:
            check_weights("dynamics.weights", weights, self.epoch_size)
        except ValueError as error:
            raise ValueError(
                f"{error}; make the sampler with the policy and the num_samples that "
                "these weights were made with"
            ) from None

    def _facts(self) -> dict[str, int | float]:
        return {
            **super()._facts(),
            "weights_version of the loaded state": self._loaded_version,
            "dynamics.weights_version": self.dynamics.weights_version,
            "dynamics.weights is None": self.dynamics.weights is None,
        }

    def _compute(self) -> Tensor:
        """The weights of the current epoch, the same on all ranks."""
        raise NotImplementedError

    def _unseen(self) -> Tensor:
        """Which samples were never seen, ``[N]`` bool on the CPU. They come first."""
        return (self.dynamics.last_step < 0).cpu()


def check_dynamics(dynamics: Any) -> None:
    """Check that dynamics are there."""
    if not isinstance(dynamics, TrainingDynamics):
        raise TypeError(f"dynamics: expected TrainingDynamics, got {type(dynamics).__name__}")


def _checksum(weights: Tensor) -> dict[str, int]:
    return {"checksum of the weights": zlib.crc32(weights.cpu().numpy().data)}
