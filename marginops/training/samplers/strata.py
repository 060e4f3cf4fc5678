"""Policies that spread the visits over easy and hard samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import _checks as checks
from ...ops.select import select_smallest
from ..dynamics.difficulty import By, check_by, difficulty
from .policies import check_keep, check_skip, number_to_skip, seen_samples

if TYPE_CHECKING:
    from ..dynamics.training_dynamics import TrainingDynamics


@dataclass(frozen=True)
class Strata:
    r"""Visit every range of margins alike: coverage-centric selection (Zheng et al., 2023).

    The policy cuts off the hardest samples and splits the range of the others into strata of equal
    width. From the smallest stratum on, each gets an equal part of the visits that are left, or all
    its samples if these are fewer. A stratum of n samples with b visits gives each sample the
    probability b / n, so it gets b visits in expectation.

    Args:
        keep: The share of all samples that an epoch visits, in (0, 1].
        num_strata: The number of strata, >= 1.
        by: As for :class:`SmallestMargins`; the authors take the AUM. Samples whose number is not
            finite make up a stratum of their own.
        skip_hardest: As for :class:`SmallestMargins`, by the same numbers as ``by``.

    Raises:
        TypeError, ValueError: An argument has the wrong type or range.

    Example:
        >>> from marginops.training import MarginSampler, Strata, TrainingDynamics
        >>> len(MarginSampler(TrainingDynamics(num_samples=100), Strata(0.3, skip_hardest=0.1)))
        30
    """

    keep: float = 0.4
    _: KW_ONLY
    num_strata: int = 50
    by: By = "aum"
    skip_hardest: float | Callable[[TrainingDynamics], float] = 0.0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        checks.check_int("num_strata", self.num_strata, 1)
        check_by("by", self.by)
        check_skip(self.skip_hardest, self.keep)

    def __call__(self, dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        """Weights ``[N]`` with the probabilities of the strata."""
        values = difficulty("by", self.by, dynamics).double()
        taken = seen_samples(dynamics, k)
        if hardest := number_to_skip(self.skip_hardest, dynamics, int(taken.sum()), k):
            taken[select_smallest(values, hardest).indices] = False
        finite = values.isfinite() & taken
        stratum = torch.full_like(values, -1, dtype=torch.int64)
        stratum[taken] = self.num_strata
        low, high = values[finite].aminmax() if finite.any() else (values.new_zeros(()),) * 2
        places = (values[finite] - low) / (high - low).clamp(min=1e-300)
        stratum[finite] = (places * self.num_strata).long().clamp(max=self.num_strata - 1)
        sizes = torch.bincount(stratum[taken], minlength=self.num_strata + 1).double()
        probability = (_budgets(sizes, k) / sizes).to(values.device)
        return order_weights(torch.where(taken, probability[stratum], 0))


def _budgets(sizes: Tensor, k: int) -> Tensor:
    """The expected number of visits of each stratum."""
    budgets = torch.zeros_like(sizes)
    left, strata = float(k), int((sizes > 0).sum())
    for place in sizes.argsort(stable=True).tolist():
        if sizes[place] > 0:
            budgets[place] = min(float(sizes[place]), left / strata)
            left -= float(budgets[place])
            strata -= 1
    return budgets


@dataclass(frozen=True)
class BetaWindow:
    r"""Visit samples by a beta density over their ranks, for example those of middle difficulty.

    The sample of rank r among n, r = 0 for the hardest, gets a probability in proportion to
    :math:`q^{a-1} (1-q)^{b-1}`, :math:`q = (r + 1/2) / n`, and at most 1. A large ``b`` prefers
    hard samples, a large ``a`` easy ones. Cho et al. (2025) draw with a beta density too, by the
    mean confidence instead of the rank.

    Args:
        keep: The share of all samples that an epoch visits, in (0, 1].
        a: > 0.
        b: > 0.
        by: As for :class:`SmallestMargins`.

    Raises:
        TypeError, ValueError: An argument has the wrong type or range.

    Example:
        >>> from marginops.training import BetaWindow, MarginSampler, TrainingDynamics
        >>> len(MarginSampler(TrainingDynamics(num_samples=100), BetaWindow(keep=0.3, a=2, b=5)))
        30
    """

    keep: float = 0.4
    _: KW_ONLY
    a: float = 2.0
    b: float = 4.0
    by: By = "margin"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_positive("a", self.a)
        check_positive("b", self.b)
        check_by("by", self.by)

    def __call__(self, dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        """Weights ``[N]`` with the probabilities of the window."""
        easy = _quantiles(difficulty("by", self.by, dynamics), seen_samples(dynamics, k))
        logs = (self.a - 1) * easy.log() + (self.b - 1) * (-easy).log1p()
        return order_weights(_probabilities(logs, k))


@dataclass(frozen=True)
class RankPower:
    r"""Visit samples by a power of their rank: the rule of Composer's selective backprop.

    The sample of rank r among n, r = 0 for the hardest, gets a probability in proportion to
    :math:`q^p`, :math:`q = 1 - (r + 1/2) / n`, and at most 1. Selective backprop (Jiang et al.,
    2019) compares a loss with recent losses in this way. Composer takes p = 1 / share - 1, which
    makes :math:`q^p` itself the probability.

    Args:
        keep: The share of all samples that an epoch visits, in (0, 1].
        power: p >= 0, or None for that of Composer.
        by: As for :class:`SmallestMargins`.

    Raises:
        TypeError, ValueError: An argument has the wrong type or range.

    Example:
        >>> from marginops.training import MarginSampler, RankPower, TrainingDynamics
        >>> len(MarginSampler(TrainingDynamics(num_samples=100), RankPower(keep=0.5)))
        50
    """

    keep: float = 0.5
    _: KW_ONLY
    power: float | None = None
    by: By = "loss"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.power not in (None, 0):
            check_positive("power", self.power)
        check_by("by", self.by)

    def __call__(self, dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        """Weights ``[N]`` with the probabilities of the ranks."""
        seen = seen_samples(dynamics, k)
        easy = _quantiles(difficulty("by", self.by, dynamics), seen)
        power = int(seen.sum()) / k - 1 if self.power is None else self.power
        return order_weights(_probabilities(power * (-easy).log1p(), k))


def _quantiles(values: Tensor, seen: Tensor) -> Tensor:
    """``[N]`` float64: (rank + 1/2) / n of the seen samples, NaN for the others."""
    # The seen samples come before the others among equal values, which may be NaN.
    order = seen.nonzero().squeeze(1)
    order = order[select_smallest(values[order], len(order)).indices]
    quantiles = torch.full_like(values, torch.nan, dtype=torch.float64)
    ranks = torch.arange(len(order), dtype=torch.float64, device=values.device)
    quantiles[order] = (ranks + 0.5) / len(order)
    return quantiles


def _probabilities(logs: Tensor, k: int) -> Tensor:
    """Numbers in proportion to ``exp(logs)``, at most 1 each, k in sum; 0 for NaN."""
    # With the lower bound, k of them are above 0 for every k.
    density = (logs - logs[~logs.isnan()].max()).exp().clamp(min=1e-30).nan_to_num(0)
    capped = torch.zeros_like(density, dtype=torch.bool)
    while True:
        left = k - int(capped.sum())
        scale = left / density[~capped].sum()
        more = ~capped & (density * scale >= 1)
        if not more.any() or left == 0:
            return torch.where(capped, 1.0, density * scale)
        capped |= more


def order_weights(probability: Tensor) -> Tensor:
    r"""Weights whose draws without replacement have given probabilities.

    With :math:`w_i = -\log(1 - p_i)` and :math:`\sum_i p_i = k`, an exponential race of which k
    samples are taken draws sample i with the probability :math:`p_i`, up to O(1 / k) (Rosén, 1997).

    Args:
        probability: ``[N]`` float64 in [0, 1].

    Returns:
        ``[N]`` float32; inf where the probability is 1.
    """
    weights = -(-probability).log1p()
    return torch.where(probability > 0, weights.float().clamp(min=2.0**-100), 0)


def check_positive(name: str, value: object) -> None:
    """Check that ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a finite value above 0, got {value}")
