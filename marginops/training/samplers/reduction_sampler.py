"""ReductionSampler: training on the samples with the smallest margins after separation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ... import _checks as checks
from ...ops.select import select_smallest
from ..dynamics.training_dynamics import TrainingDynamics
from .class_floor import checked_labels, rank_within_class
from .dynamics_sampler import DynamicsSampler, check_dynamics
from .order import random_numbers
from .policies import check_share

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Choice = Literal["smallest", "largest", "random"]


class ReductionSampler(DynamicsSampler):
    r"""Trains on all samples until they are separated, then on the M with the smallest margins.

    Banburski et al. (2021) reduce the training set in this way to less than a hundredth, once the
    training error is 0. Until then each epoch draws from all N samples alike, those first that were
    never seen.

    Every epoch has the same length, so the M samples are visited several times in a reduced epoch:
    in passes, each in an order of its own. With ``shrink=True`` an epoch visits each kept sample
    once, and ``len()`` changes with the number of kept samples. A host that reads ``len()`` once
    has to be told.

    **Margins.** An epoch sees its samples one after the other, while the network and its norm
    change. The last margins in the dynamics are thus those of different networks, and normalised
    ones have different norms. At a constant training error of 0 this matters little. For the exact
    margins of one network give ``rescore``, which costs one forward pass over the data.

    **Batch normalisation.** Running statistics follow the kept samples. To have those of all data,
    call ``torch.optim.swa_utils.update_bn(loader, network)`` before you evaluate, with a loader of
    the whole data set.

    Args:
        dynamics: The dynamics, which the training loop updates.
        num_kept: M, how many samples stay.
        trigger: The reduction begins with the first epoch before which every sample was seen and
            at least this share of the last margins is above 0.
        choice: ``"smallest"`` margins, or as controls ``"largest"`` margins or ``"random"``.
        factor: None keeps M samples at once. A number in (0, 1) keeps this share of the samples
            at each reduction, down to M.
        every: The number of epochs between two reductions.
        readmit: Whether a later reduction chooses from all N samples again. Without it only kept
            samples can stay. With it, every epoch chooses again.
        labels: ``[N]`` int64, the classes of all samples, for ``class_floor``.
        class_floor: How many samples of each class are kept at least, or all if it has fewer.
        rescore: A function that returns the margins ``[N]`` of all samples. It runs at each
            choice, on every rank, and has to return the same there.
        num_samples: How many samples all ranks together visit in an epoch, at most N. The default
            is N.
        shrink: Visit each kept sample once in an epoch.
        budget: How many visits of kept samples there are in all, for :attr:`finished`.
        seed: 0 <= seed < 2**63.
        num_replicas: As for :class:`MarginSampler`, and so are the next arguments.
        rank: The number of this rank.
        group: The process group of the ranks.
        drop_last: Leave out the last samples of the order instead of padding it.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or range.

    Example:
        >>> import torch
        >>> from marginops.training import ReductionSampler, TrainingDynamics
        >>> dynamics = TrainingDynamics(num_samples=6)
        >>> sampler = ReductionSampler(dynamics, num_kept=2)
        >>> sampler.set_epoch(0)
        >>> sorted(sampler)
        [0, 1, 2, 3, 4, 5]
        >>> logits = torch.tensor([[3.0], [1.0], [4.0], [1.5], [5.0], [9.0]]) * torch.eye(2)[0]
        >>> _ = dynamics.update(torch.arange(6), logits, torch.zeros(6, dtype=torch.int64))
        >>> sampler.set_epoch(1)
        >>> sorted(sampler), sampler.kept.tolist()
        ([1, 1, 1, 3, 3, 3], [1, 3])
    """

    _repeats = True

    def __init__(
        self,
        dynamics: TrainingDynamics,
        num_kept: int,
        *,
        trigger: float = 1.0,
        choice: Choice = "smallest",
        factor: float | None = None,
        every: int = 1,
        readmit: bool = False,
        labels: Tensor | None = None,
        class_floor: int = 0,
        rescore: Callable[[], Tensor] | None = None,
        num_samples: int | None = None,
        shrink: bool = False,
        budget: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        group: ProcessGroup | None = None,
        drop_last: bool = False,
    ) -> None:
        check_dynamics(dynamics)
        population = dynamics.num_samples
        checks.check_int("num_kept", num_kept, 1)
        if num_kept > population:
            raise ValueError(
                f"num_kept: expected at most {population}, the size of the data set, got {num_kept}"
            )
        check_share("trigger", trigger)
        if choice not in ("smallest", "largest", "random"):
            raise ValueError(f"choice: expected 'smallest', 'largest' or 'random', got {choice!r}")
        if factor is not None:
            check_share("factor", factor)
            if factor in (0, 1):
                raise ValueError(f"factor: expected a value in (0, 1), got {factor}")
        checks.check_int("every", every, 1)
        for name, flag in (("readmit", readmit), ("shrink", shrink)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
        checks.check_int("class_floor", class_floor, 0)
        if labels is not None:
            labels = checked_labels(labels, population)
            least = int(labels.bincount().clamp(max=class_floor).sum())
            if least > num_kept:
                raise ValueError(
                    f"class_floor: expected at most num_kept, {num_kept}, samples for all classes, "
                    f"got {least}"
                )
        elif class_floor > 0:
            raise ValueError("labels: expected a tensor [N] with class_floor, got None")
        if rescore is not None and not callable(rescore):
            raise TypeError(f"rescore: expected a function, got {type(rescore).__name__}")
        if shrink and num_samples is not None:
            raise ValueError(f"num_samples: expected None with shrink=True, got {num_samples}")
        if budget is not None:
            checks.check_int("budget", budget, 1)
        size = population if num_samples is None else num_samples
        super().__init__(dynamics, size, seed, num_replicas, rank, group, drop_last)
        if shrink and drop_last and num_kept < self.num_replicas:
            raise ValueError(
                f"num_kept: expected at least num_replicas, {self.num_replicas}, with drop_last, "
                f"got {num_kept}"
            )
        self.num_kept, self.trigger, self.choice = num_kept, trigger, choice
        self.factor, self.every, self.readmit = factor, every, readmit
        self.rescore, self.shrink, self.budget = rescore, shrink, budget
        self._labels, self._class_floor = labels, class_floor
        self._reduced_at = -1

    @property
    def reduced_at(self) -> int | None:
        """The first epoch with fewer samples, or None before it."""
        return None if self._reduced_at < 0 else self._reduced_at

    @property
    def kept(self) -> Tensor:
        """The kept samples, ``[M]`` int64, ascending: all before the reduction.

        A training from scratch on them is a control of its own: ``Subset(dataset, sampler.kept)``.
        """
        if self._reduced_at < 0 or self.dynamics.weights is None:
            return torch.arange(self.population, device="cpu")
        return self.dynamics.weights.cpu().nonzero().squeeze(1)

    @property
    def finished(self) -> bool:
        """Whether the epochs before the current one used up the budget."""
        if self.budget is None or self._reduced_at < 0:
            return False
        earlier = range(self._reduced_at, self.epoch)
        visits = sum(self._kept_at(epoch) if self.shrink else self.epoch_size for epoch in earlier)
        return visits >= self.budget

    def state_dict(self, position: int | None = None) -> dict[str, int]:
        """The state as six integers, as :meth:`MarginSampler.state_dict`, with ``reduced_at``."""
        return {**super().state_dict(position), "reduced_at": self._reduced_at}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue the epoch of a state at its position. Load the dynamics first."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        others = {name: value for name, value in state_dict.items() if name != "reduced_at"}
        reduced_at = state_dict.get("reduced_at")
        if type(reduced_at) is not int or reduced_at < -1:
            raise ValueError(f"state_dict: expected reduced_at as an int >= -1, got {reduced_at!r}")
        super().load_state_dict(others)
        self._reduced_at = reduced_at
        weights = self.dynamics.weights
        if weights is not None and self.dynamics.weights_version == self.epoch:
            self._adopt(weights)

    def _adopt(self, weights: Tensor) -> None:
        if not (weights > 0).any():
            raise ValueError("dynamics.weights: expected a positive weight, got weights of 0")
        if self.shrink:
            self._resize(int((weights > 0).sum()))

    def _compute(self) -> Tensor:
        if self._reduced_at > self.epoch:
            raise ValueError(
                f"epoch: expected at least {self._reduced_at}, the epoch of the reduction, got "
                f"{self.epoch}; make a new sampler to begin anew"
            )
        before = self._reduced_at
        if before < 0:
            unseen = self._unseen()
            if unseen.any() or not self._separated():
                few = int(unseen.sum()) < self.epoch_size
                return torch.where(unseen, torch.inf, 1.0).float() if few else unseen.float()
            kept = torch.ones(self.population, dtype=torch.bool, device="cpu")
        elif self.dynamics.weights is None:
            raise ValueError(
                "dynamics: expected the weights that hold the kept samples, got None; load the "
                "state of the dynamics that was saved with the state of the sampler"
            )
        else:
            kept = self.dynamics.weights.cpu() > 0
        size = self._kept_at(self.epoch, self.epoch if before < 0 else before)
        candidates = torch.ones_like(kept) if self.readmit else kept
        weights = torch.zeros(self.population, dtype=torch.float32, device="cpu")
        weights[self._choose(candidates, size)] = 1
        if before < 0:
            self._reduced_at = self.epoch
        return weights

    def _separated(self) -> bool:
        """Whether enough margins are positive."""
        return int((self.dynamics.margin > 0).sum()) >= self.trigger * self.population

    def _kept_at(self, epoch: int, reduced_at: int | None = None) -> int:
        """How many samples an epoch keeps."""
        if self.factor is None:
            return self.num_kept
        start = self._reduced_at if reduced_at is None else reduced_at
        reductions = (epoch - start) // self.every + 1
        return max(self.num_kept, math.ceil(self.population * self.factor**reductions))

    def _choose(self, candidates: Tensor, size: int) -> Tensor:
        """The ids that are kept."""
        ids = candidates.nonzero().squeeze(1)
        if len(ids) <= size:
            return ids
        if self.choice == "random":
            values = random_numbers(self.population, self.seed, self.epoch)
        else:
            values = self._margins()
        if self.choice == "largest":
            values = -values
        ordered = ids[select_smallest(values[ids], len(ids)).indices]
        if self._labels is not None and self._class_floor > 0:
            floor = rank_within_class(self._labels[ordered]) < self._class_floor
            ordered = torch.cat([ordered[floor], ordered[~floor]])
        return ordered[:size]

    def _margins(self) -> Tensor:
        if self.rescore is None:
            return self.dynamics.margin.cpu()
        margins = self.rescore()
        checks.check_tensor("rescore", margins, 1, "[N]")
        if len(margins) != self.population:
            raise ValueError(
                f"rescore: expected margins of shape [{self.population}], got {list(margins.shape)}"
            )
        return margins.detach().cpu()
