"""WeightedSampler: epochs drawn from given weights."""

import zlib

from torch import Tensor

from ... import _checks as checks
from .epoch_sampler import EpochSampler
from .order import as_weights


class WeightedSampler(EpochSampler):
    r"""Draws samples without replacement by given weights, the same on all ranks.

    Each of the k draws of an epoch takes a sample in proportion to the weights of the samples that
    are left. This is the law of ``torch.multinomial`` without replacement, with no limit of
    :math:`2^{24}` samples. All ids of an epoch are then shuffled. A pure function of (seed, epoch,
    weights) gives the order, with the same bits on every machine.

    With several ranks, rank r takes the elements r, r + R, r + 2R, ... of the order, R =
    ``num_replicas``. If R does not divide k, the ranks without a last element repeat those that
    the lower ranks visit last; with ``drop_last`` no rank visits these.

    Args:
        weights: ``[N]`` float32 or float64, on any device, in [0, inf]. A sample of weight 0 is
            never drawn, and one of weight inf always. A positive weight below :math:`2^{-100}` of
            the largest finite one counts as that share of it. The sampler keeps a copy.
        num_samples: k, how many samples all ranks together visit in an epoch, at most the number
            of positive weights and at least the number of infinite ones. The default is the number
            of positive weights.
        seed: 0 <= seed < 2**63.
        num_replicas: The number of ranks.
        rank: The number of this rank.
        drop_last: Leave out the last k mod R samples of the order instead of padding it.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or range.

    :meth:`set_epoch` names the epoch; without it each iteration gives the same order. An epoch
    takes O(N) time: for :math:`N = 10^6` as long as two to three calls of ``torch.randperm(N)``.

    The method is that of Efraimidis and Spirakis (2006), as an exponential race.

    Example:
        >>> import torch
        >>> from marginops.training import WeightedSampler
        >>> sampler = WeightedSampler(torch.tensor([0.0, 1.0, 1.0, torch.inf]), num_samples=2)
        >>> sampler.set_epoch(3)
        >>> ids = list(sampler)
        >>> 3 in ids, 0 in ids, len(ids)
        (True, False, 2)
        >>> sampler.state_dict(position=1)["position"]
        1
    """

    def __init__(
        self,
        weights: Tensor,
        num_samples: int | None = None,
        *,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        checks.check_tensor("weights", weights, 1, "[N]")
        check_weights("weights", weights, num_samples)
        if num_samples is None:
            num_samples = int((weights > 0).sum())
        super().__init__(len(weights), num_samples, seed, num_replicas, rank, drop_last)
        self._weights = as_weights(weights)
        self._weights_version = zlib.crc32(self._weights.numpy().data)

    def _drawn_weights(self) -> tuple[Tensor, int]:
        return self._weights, self._weights_version


def check_weights(name: str, weights: Tensor, num_samples: int | None) -> None:
    """Check that ``num_samples`` samples can be drawn by ``weights``."""
    wrong = ~(weights >= 0)
    if wrong.any():
        place = int(wrong.int().argmax())
        raise ValueError(
            f"{name}: expected numbers in [0, inf], got {weights[place].item()} for sample {place}"
        )
    positive, certain = int((weights > 0).sum()), int(weights.isposinf().sum())
    if positive == 0:
        raise ValueError(f"{name}: expected a positive weight, got {len(weights)} weights of 0")
    if isinstance(num_samples, int) and not certain <= num_samples <= positive:
        expected = (
            f"at least num_samples, {num_samples}, positive weights, got {positive}"
            if num_samples > positive
            else f"at most num_samples, {num_samples}, infinite weights, got {certain}"
        )
        raise ValueError(f"{name}: expected {expected}")
