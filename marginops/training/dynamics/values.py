"""The attributes of TrainingDynamics, and what can be read out of the state."""

import torch
from torch import Tensor

from ...ops.dynamics import COUNTS, VALUES, DynamicsState


class DynamicsValues:
    """What TrainingDynamics hold, and the values of all samples as attributes."""

    num_samples: int
    decay: float
    weights: Tensor | None
    weights_version: int
    _state: DynamicsState
    _common_nonfinite: int  # the visits that all ranks knew of at the last sync

    @property
    def device(self) -> torch.device:
        """The device of the state."""
        return self._state.values.device

    @property
    def num_updates(self) -> int:
        """The number of updates so far. Reading it waits for the GPU."""
        return int(self._state.totals[0])

    @property
    def num_nonfinite(self) -> int:
        """The number of visits with values that are not finite. Reading it waits for the GPU."""
        return int(self._state.totals[1])

    @property
    def margin(self) -> Tensor:
        """The margin as last seen."""
        return self._last("margin")

    @property
    def score(self) -> Tensor:
        """The score as last seen."""
        return self._last("score")

    @property
    def loss(self) -> Tensor:
        """The loss as last seen."""
        return self._last("loss")

    @property
    def margin_average(self) -> Tensor:
        """The moving average of the margin."""
        return self._mean("margin_average")

    @property
    def aum(self) -> Tensor:
        """The mean margin, which is the area under the margin."""
        return self._mean("margin_mean")

    @property
    def confidence(self) -> Tensor:
        """The mean confidence."""
        return self._mean("confidence_mean")

    @property
    def variability(self) -> Tensor:
        """The standard deviation of the confidence over all visits."""
        return (self._value("confidence_m2") / self._count("count")).sqrt_()

    @property
    def el2n(self) -> Tensor:
        """The mean EL2N."""
        return self._mean("el2n_mean")

    @property
    def correctness(self) -> Tensor:
        """The share of visits at which the sample was correct."""
        return self._count("correct") / self._count("count")

    @property
    def count(self) -> Tensor:
        """The number of visits."""
        return self._count("count").clone()

    @property
    def forgetting(self) -> Tensor:
        """How often the sample was forgotten."""
        return self._count("forgotten").clone()

    @property
    def learnt(self) -> Tensor:
        """Whether the sample was ever correct."""
        return self._count("learnt") > 0

    @property
    def last_step(self) -> Tensor:
        """The number of the update that saw the sample last."""
        return self._state.last_seen >> 32

    def _value(self, name: str) -> Tensor:
        return self._state.values[:, VALUES.index(name)]

    def _count(self, name: str) -> Tensor:
        return self._state.counts[:, COUNTS.index(name)]

    def _last(self, name: str) -> Tensor:
        return torch.where(self._state.last_seen < 0, torch.nan, self._value(name))

    def _mean(self, name: str) -> Tensor:
        return torch.where(self._count("count") == 0, torch.nan, self._value(name))
