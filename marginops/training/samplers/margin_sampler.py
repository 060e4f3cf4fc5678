"""MarginSampler: the next epoch by what training saw of every sample."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import _checks as checks
from ..dynamics.training_dynamics import TrainingDynamics
from .class_floor import checked_labels, with_class_floor
from .dynamics_sampler import DynamicsSampler, check_dynamics
from .order import as_weights
from .policies import SmallestMargins, check_share
from .subset import all_in, checked_subset, limited_to
from .weighted_sampler import check_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Policy = Callable[[TrainingDynamics, int, Tensor | None], Tensor]


class MarginSampler(DynamicsSampler):
    r"""Draws each epoch by what :class:`TrainingDynamics` saw of every sample.

    :meth:`set_epoch` computes weights from the dynamics and keeps them there, and the order is a
    pure function of (seed, epoch, weights). It runs on all ranks alike.

    Args:
        dynamics: The dynamics, which the training loop updates.
        policy: Which samples an epoch prefers: :class:`SmallestMargins`, :class:`Strata`,
            :class:`BetaWindow`, :class:`RankPower`, :class:`BelowMeanLoss`, :class:`Uniform`, or a
            function ``policy(dynamics, k, labels)`` that returns weights ``[N]`` in [0, inf], at
            least k of them positive and at most k of them inf, which means a certain visit.
        num_samples: k, how many samples all ranks together visit in an epoch. The default is
            ``ceil(policy.keep * N)``, or ``ceil(policy.keep * M)`` with ``subset``. All epochs have
            this length.
        subset: ``[M]`` int64, the different indices of the samples that epochs draw from, such as
            ``read_result(folder).indices`` of :mod:`marginops.scoring`. Indices keep their meaning:
            ``dynamics`` and ``labels`` are those of all N samples. To the sampler and its policy
            the subset is the whole data set, and the others look like samples never seen. The
            default is all samples.
        labels: ``[N]`` int64, the classes of all samples, for ``class_floor`` and for policies of
            your own.
        class_floor: The share of each class that an epoch visits at least, in [0, k / N], or
            [0, k / M] with ``subset``. The samples that the policy prefers fill it up, among equals
            those with the smallest margin. It holds from the epoch on in which every sample was
            seen before, and costs a sort.
        num_epochs: The number of epochs of the whole training, for ``anneal``.
        anneal: The share of ``num_epochs``, at the end, whose epochs draw from all samples alike.
        uniform_above: Draw from all samples alike while the share of samples with a positive last
            margin is above this. The default never does.
        seed: 0 <= seed < 2**63.
        num_replicas: The number of ranks; the default is that of ``group``, or 1. Without
            ``group``, give all ranks equal dynamics with ``dynamics.sync()`` before each
            :meth:`set_epoch`; else they draw different epochs.
        rank: The number of this rank; the default is that in ``group``, or 0.
        group: The process group of the ranks. :meth:`set_epoch` is then a collective call that
            syncs the dynamics first.
        drop_last: Leave out the last samples of the order, instead of padding it, if the ranks
            cannot share it evenly.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or range.

    An epoch takes O(N) time and memory beside the dynamics. For :math:`N = 10^6` and the default
    policy, one CPU thread takes about 30 ms for the weights and 12 ms for the order.

    Without :meth:`set_epoch`, each iteration gives the same order. A new sampler on dynamics that
    already hold weights of the same epoch goes on with these weights; set
    ``dynamics.weights_version = -1`` to begin anew.

    Samples that were never seen come first. So the first ``ceil(N / k)`` epochs visit every sample
    once, if each visit updates the dynamics.

    To resume, restore the dynamics and then the sampler. A state within an epoch needs dynamics
    that hold the weights of this epoch. With several ranks, call ``dynamics.sync(group)`` on all
    of them, save the state on one, and load it on all. :meth:`state_dict` says nothing about
    policies, labels and the subset; make the sampler with the same ones.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from marginops.training import MarginSampler, TrainingDynamics
        >>> dynamics = TrainingDynamics(num_samples=100)
        >>> data = TensorDataset(torch.arange(100), torch.randn(100, 8), torch.arange(100) % 4)
        >>> sampler = MarginSampler(dynamics)
        >>> loader = DataLoader(data, batch_size=10, sampler=sampler)
        >>> network = torch.nn.Linear(8, 4)
        >>> for epoch in range(5):
        ...     sampler.set_epoch(epoch)
        ...     for indices, inputs, target in loader:
        ...         loss = dynamics.update(indices, network(inputs), target).mean_loss()
        >>> len(sampler), int(dynamics.count.sum()), bool((dynamics.count > 0).all())
        (40, 200, True)
    """

    def __init__(
        self,
        dynamics: TrainingDynamics,
        policy: Policy = SmallestMargins(),  # noqa: B008 - it is frozen
        *,
        num_samples: int | None = None,
        subset: Tensor | None = None,
        labels: Tensor | None = None,
        class_floor: float = 0.0,
        num_epochs: int | None = None,
        anneal: float = 0.1,
        uniform_above: float | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        group: ProcessGroup | None = None,
        drop_last: bool = False,
    ) -> None:
        check_dynamics(dynamics)
        if not callable(policy):
            raise TypeError(
                "policy: expected a policy such as SmallestMargins(), or a function of dynamics, "
                f"k and labels, got {type(policy).__name__}"
            )
        if subset is not None:
            subset = checked_subset(subset, dynamics.num_samples)
        size = dynamics.num_samples if subset is None else len(subset)
        if num_samples is None:
            keep = getattr(policy, "keep", None)
            if keep is None:
                raise ValueError(
                    "num_samples: expected an int with a policy that has no attribute keep, got "
                    "None"
                )
            num_samples = math.ceil(round(keep * size, 6))
        elif subset is not None and isinstance(num_samples, int) and num_samples > size:
            raise ValueError(
                f"num_samples: expected at most {size}, the size of the subset, got {num_samples}; "
                "no sample comes twice in an epoch"
            )
        super().__init__(dynamics, num_samples, seed, num_replicas, rank, group, drop_last)
        check_share("anneal", anneal)
        if num_epochs is not None:
            checks.check_int("num_epochs", num_epochs, 1)
        if uniform_above is not None:
            check_share("uniform_above", uniform_above)
        check_share("class_floor", class_floor, num_samples / size)
        if class_floor > 0 and labels is None:
            raise ValueError("labels: expected a tensor [N] with class_floor, got None")
        if labels is not None:
            labels = checked_labels(labels, self.population)
        self.policy = policy
        self._subset, self._size = subset, size
        self._labels, self._class_floor = labels, class_floor
        self._uniform_above = uniform_above
        self._uniform_from = (
            math.inf
            if num_epochs is None
            else num_epochs - math.ceil(round(anneal * num_epochs, 6))
        )
        self._inverse: tuple[Tensor, float | None] | None = None

    def loss_weights(self, indices: Tensor) -> Tensor:
        """The inverse of the probability with which the current epoch visits a sample.

        The sum of weight times loss over an epoch is an unbiased estimate of the sum of the losses
        of all N samples (Horvitz & Thompson, 1952). For the mean loss of a batch to estimate the
        mean loss of all samples, multiply by ``epoch_size / N`` too. With a subset, all samples are
        its M samples.

        Args:
            indices: ``[B]`` int64, samples of the epoch, on any device.

        Returns:
            ``[B]`` float32 on the device of ``indices``.

        Raises:
            ValueError: The probabilities are not known exactly, because the policy gives several
                different weights, or the estimate would be biased, because some samples have weight
                0. So it is in the first epochs, which visit unseen samples; see :attr:`unbiased`.
        """
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices: expected a tensor [B] of torch.int64, got {got}")
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.population):
            raise ValueError(
                f"indices: expected samples in [0, {self.population}), got {int(indices.min())} to "
                f"{int(indices.max())}"
            )
        inverse = self._inverse_probability()
        if inverse is None:
            raise ValueError(
                "policy: expected weights of inf and of one other positive number, without which "
                "loss weights are not exact; use SmallestMargins with a random share and without "
                "skip_hardest, BelowMeanLoss or Uniform, and ask sampler.unbiased in each epoch"
            )
        weights = self._drawn_weights()[0][indices.cpu()]
        if self._subset is not None and not all_in(self._subset, indices.cpu()):
            raise ValueError(
                "indices: expected samples of the subset, got others, which no epoch visits"
            )
        certain = weights.isposinf()
        return torch.where(certain, 1.0, inverse).float().to(indices.device)

    @property
    def unbiased(self) -> bool:
        """Whether :meth:`loss_weights` knows exact weights in the current epoch."""
        return self._inverse_probability() is not None

    def _inverse_probability(self) -> float | None:
        """For samples that are not certain; None if it differs or is not known."""
        weights, _ = self._drawn_weights()
        if self._inverse is None or self._inverse[0] is not weights:
            certain = weights.isposinf()
            others = self._size - int(certain.sum())
            visits = self.epoch_size - self._size + others
            exact = int((weights == 1).sum()) == others and (visits > 0 or others == 0)
            self._inverse = weights, others / max(visits, 1) if exact else None
        return self._inverse[1]

    def _compute(self) -> Tensor:
        """The weights of the current epoch."""
        dynamics, k = self.dynamics, self.epoch_size
        allowed = self._allowed()
        if self._subset is not None:
            dynamics = limited_to(allowed, dynamics)
        if self._is_uniform(dynamics):
            return allowed.float()
        unseen = self._unseen() & allowed
        others = k - int(unseen.sum())
        if others <= 0:
            return unseen.float()
        weights = self.policy(dynamics, others, self._labels)
        checks.check_tensor("policy", weights, 1, "[N]")
        if len(weights) != self.population:
            raise ValueError(
                f"policy: expected weights of shape [{self.population}], got {list(weights.shape)}"
            )
        weights = torch.where(unseen | ~allowed, 0, weights.detach().cpu())
        check_weights("policy", weights, others)
        weights = as_weights(weights.masked_fill_(unseen, torch.inf))
        if self._class_floor > 0 and self._labels is not None and others == k:
            own = slice(None) if self._subset is None else self._subset
            margin, labels = dynamics.margin.cpu()[own], self._labels[own]
            weights[own] = with_class_floor(weights[own], margin, labels, self._class_floor)
        return weights

    def _allowed(self) -> Tensor:
        """Which samples an epoch may visit, ``[N]`` bool on the CPU."""
        allowed = torch.ones(self.population, dtype=torch.bool, device="cpu")
        if self._subset is not None:
            allowed.zero_()[self._subset] = True
        return allowed

    def _is_uniform(self, dynamics: TrainingDynamics) -> bool:
        if self.epoch >= self._uniform_from:
            return True
        if self._uniform_above is None:
            return False
        return int((dynamics.margin > 0).sum()) > self._uniform_above * self._size

    def _adopt(self, weights: Tensor) -> None:
        super()._adopt(weights)
        if self._subset is not None and (weights.cpu()[~self._allowed()] > 0).any():
            raise ValueError(
                "dynamics.weights: expected 0 for all samples outside the subset, got positive "
                "weights; make the sampler with the subset that these weights were made with"
            )

    def _facts(self) -> dict[str, int | float]:
        checksum = -1 if self._subset is None else zlib.crc32(self._subset.numpy().data)
        return {**super()._facts(), "checksum of the subset": checksum}
