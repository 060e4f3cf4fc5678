"""Policies: which samples the next epoch visits, from what training saw of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ops.select import select_smallest
from ..dynamics.difficulty import By, check_by, difficulty

if TYPE_CHECKING:
    from ..dynamics.training_dynamics import TrainingDynamics


@dataclass(frozen=True)
class SmallestMargins:
    r"""Visit the samples with the smallest margins as last seen, and some of the others at random.

    Of k visits, :math:`\lfloor (1 - r) k \rceil` go to the smallest margins of either sign, r =
    ``random_share``. The other visits go to a random choice of the remaining samples, so that every
    margin is renewed now and then. Without it the policy would never learn that a sample was
    forgotten.

    Keeping the hardest falls below a random choice where most labels are wrong or more than about
    two thirds of the data are left out (Sorscher et al., 2022; Zheng et al., 2023).

    Args:
        keep: The share of all samples that an epoch visits, in (0, 1].
        random_share: The share of the visits that are random, in [0, 1].
        by: What the policy goes by: ``"margin"``, ``"margin_average"``, ``"aum"``, ``"score"``,
            ``"confidence"`` and ``"correctness"``, where small is hard, or ``"loss"``, ``"el2n"``,
            ``"variability"`` and ``"forgetting"``, where large is hard. Or a tensor ``[N]``, or a
            function of the dynamics that returns one, where small is hard. What is not finite
            counts as easy.
        skip_hardest: The share of the seen samples that is left out because they are the hardest
            and so perhaps mislabelled, in [0, 1 - keep], or a function of the dynamics that
            returns it, such as :func:`marginops.training.mislabelled_share`. What it returns is
            lowered where too few samples would be left.
        skip_by: What says which are the hardest, as ``by``.

    Raises:
        TypeError, ValueError: An argument has the wrong type or range.

    Example:
        >>> import torch
        >>> from marginops.training import MarginSampler, SmallestMargins, TrainingDynamics
        >>> dynamics = TrainingDynamics(num_samples=4)
        >>> logits = torch.tensor([[2.0, 0.5], [0.0, 3.0], [1.0, 0.9], [4.0, 0.0]])
        >>> _ = dynamics.update(torch.arange(4), logits, torch.zeros(4, dtype=torch.int64))
        >>> sorted(MarginSampler(dynamics, SmallestMargins(keep=0.5, random_share=0.0)))
        [1, 2]
    """

    keep: float = 0.4
    _: KW_ONLY
    random_share: float = 0.2
    by: By = "margin"
    skip_hardest: float | Callable[[TrainingDynamics], float] = 0.0
    skip_by: By = "margin_average"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_share("random_share", self.random_share)
        check_by("by", self.by)
        check_by("skip_by", self.skip_by)
        check_skip(self.skip_hardest, self.keep)

    def __call__(self, dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        """Weights ``[N]``: inf for the smallest margins, 1 for the others, 0 for the hardest."""
        values = difficulty("by", self.by, dynamics)
        seen = seen_samples(dynamics, k)
        weights = seen.float()
        if hardest := number_to_skip(self.skip_hardest, dynamics, int(seen.sum()), k):
            by = difficulty("skip_by", self.skip_by, dynamics)
            skipped = select_smallest(by, hardest).indices
            weights[skipped] = 0
            values[skipped] = torch.nan
        certain = k - math.floor(self.random_share * k + 0.5)
        # The random share may have to take what has no finite margin.
        certain = min(certain, int((~values.isnan()).sum()))
        weights[select_smallest(values, certain).indices] = torch.inf
        if self.random_share == 0 and certain == k:
            weights[weights == 1] = 0
        return weights


@dataclass(frozen=True)
class Uniform:
    """Visit a random choice of samples, each with the same probability.

    Args:
        keep: The share of all samples that an epoch visits, in (0, 1].

    Raises:
        TypeError, ValueError: An argument has the wrong type or range.

    Example:
        >>> from marginops.training import MarginSampler, TrainingDynamics, Uniform
        >>> len(MarginSampler(TrainingDynamics(num_samples=10), Uniform(0.5)))
        5
    """

    keep: float = 1.0

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def __call__(self, dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        """Weights ``[N]``, all of them 1."""
        return torch.ones(dynamics.num_samples, dtype=torch.float32, device=dynamics.device)


@dataclass(frozen=True)
class BelowMeanLoss:
    r"""Visit all samples whose loss is not below the mean, and a random part of the others.

    This is the rule of InfoBatch (Qin et al., 2024) for an epoch of constant length: of the
    :math:`N_<` samples with a loss below the mean, :math:`k - N_\ge` are drawn. So each is dropped
    with the probability :math:`r = 1 - (k - N_\ge) / N_<`, and
    :meth:`MarginSampler.loss_weights` is :math:`1 / (1 - r)` for it. If :math:`N_\ge \ge k`, the
    epoch is a uniform choice.

    InfoBatch ends with epochs of all data: use ``num_epochs`` and ``anneal`` of
    :class:`MarginSampler`.

    Args:
        keep: The share of all samples that an epoch visits, in (0, 1].
        by: As for :class:`SmallestMargins`. "Below the mean" is the easy side of the mean of all
            finite numbers.

    Raises:
        TypeError, ValueError: An argument has the wrong type or range.

    Example:
        >>> from marginops.training import BelowMeanLoss, MarginSampler, TrainingDynamics
        >>> sampler = MarginSampler(TrainingDynamics(num_samples=10), BelowMeanLoss(keep=0.7))
        >>> len(sampler)
        7
    """

    keep: float = 0.7
    _: KW_ONLY
    by: By = "loss"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_by("by", self.by)

    def __call__(self, dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        """Weights ``[N]``: inf from the mean loss on, 1 below it."""
        values = difficulty("by", self.by, dynamics)
        finite = values.isfinite()
        hard = finite & (values <= values[finite].double().mean())
        weights = torch.ones_like(values)
        if int(hard.sum()) < k:
            weights[hard] = torch.inf
        return weights


def check_share(name: str, share: Any, most: float = 1.0) -> None:
    """Check that a share is a number in [0, ``most``]."""
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(share).__name__}")
    if not 0 <= share <= most:
        raise ValueError(f"{name}: expected a value in [0, {most:g}], got {share}")


def check_keep(keep: Any) -> None:
    """Check the share of all samples that an epoch visits."""
    check_share("keep", keep)
    if keep == 0:
        raise ValueError("keep: expected a value in (0, 1], got 0")


def check_skip(skip: Any, keep: float) -> None:
    """Check the share of the hardest samples, if it is known already."""
    if not callable(skip):
        check_share("skip_hardest", skip, 1 - keep)


def seen_samples(dynamics: TrainingDynamics, k: int) -> Tensor:
    """Which samples were seen, ``[N]`` bool. At least k have to be."""
    seen = dynamics.last_step >= 0
    number = int(seen.sum())
    if number < k:
        raise ValueError(
            f"dynamics: expected at least k = {k} samples that were seen, got {number}; let "
            "MarginSampler call the policy, which visits the other samples first"
        )
    return seen


def number_to_skip(skip: Any, dynamics: TrainingDynamics, seen: int, k: int) -> int:
    """How many of the hardest samples are left out, of which k have to stay."""
    share = skip(dynamics) if callable(skip) else skip
    check_share("skip_hardest", share)
    number = math.floor(share * seen)
    if callable(skip):  # what a function finds must not stop a training that goes on for days
        return min(number, seen - k)
    if seen - number < k:
        raise ValueError(
            f"skip_hardest: expected a share that leaves {k} of {seen} seen samples, got {share}; "
            "lower it, or lower keep"
        )
    return number
