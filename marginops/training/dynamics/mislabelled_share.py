"""How many labels look wrong, from the averaged margins of a training run alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ... import _checks as checks
from .difficulty import By, check_by, difficulty

if TYPE_CHECKING:
    from .training_dynamics import TrainingDynamics

_MARGINS = "margin_average", "margin", "aum"
_BINS_PER_MEDIAN = 4  # bins of the histogram up to the median of the positive margins
_BINS = 60
_DEEPEST_VALLEY = 0.9  # of the height of the peak below it
_LARGEST_SHARE = 0.5
_DEVIATIONS = 4  # by how many standard deviations the peak is above the valley


def mislabelled_share(dynamics: TrainingDynamics, by: By = "margin_average") -> float:
    r"""The share of the seen samples whose margins form a mode of their own below zero.

    A network learns the right labels first. Meanwhile the margins of many wrong labels form a
    second mode below zero, while those of merely hard samples fall off from zero on. So the
    function looks for a valley in the histogram of the negative margins. Nobody has to tell it how
    many labels are wrong, and without a valley it returns 0.

    The bins are a quarter of the median positive margin wide, and so do not depend on the scale of
    the logits. A bin v is a valley if a bin p further below has a larger count n, with
    :math:`n_v < 0.9 \, n_p` and :math:`n_p - n_v > 4 \sqrt{n_p + n_v}`. Of several pairs, the one
    with the smallest :math:`n_v / n_p` counts. The share is that of the margins below the middle
    between its v and p. A mode with more than half of the samples tells of a network that has not
    learnt yet, and the share is 0.

    Args:
        dynamics: What training saw of the samples.
        by: The margins: ``"margin_average"``, ``"margin"``, ``"aum"``, a tensor ``[N]``, or a
            function of the dynamics that returns one. Right labels have positive margins.

    Returns:
        A number in [0, 0.5].

    Raises:
        TypeError, ValueError: ``by`` has the wrong type, shape or name.

    The function is made for ``skip_hardest`` of :class:`SmallestMargins` with ``keep`` up to 0.5.
    It may overlook a few wrong labels, up to about 5 %. If the network never learns one kind of
    samples, the function takes them for mislabelled. The cost is that of a few passes over
    ``[N]``.

    Example:
        >>> import torch
        >>> from marginops.training import SmallestMargins, TrainingDynamics, mislabelled_share
        >>> policy = SmallestMargins(0.4, skip_hardest=mislabelled_share)
        >>> dynamics = TrainingDynamics(num_samples=10_000)
        >>> margins = torch.cat([torch.randn(8000) + 2, torch.randn(2000) - 4])
        >>> logits = torch.stack([margins, torch.zeros(10_000)], dim=1)
        >>> target = torch.zeros(10_000, dtype=torch.int64)
        >>> _ = dynamics.update(torch.arange(10_000), logits, target)
        >>> 0.1 < mislabelled_share(dynamics) < 0.25
        True
    """
    if isinstance(by, str):
        checks.check_choice("by", by, _MARGINS)
    check_by("by", by)
    values = difficulty("by", by, dynamics)
    values = values[values.isfinite()]
    positive, negative = values[values > 0], values[values < 0]
    if len(positive) == 0 or len(negative) == 0:
        return 0.0
    width = float(positive.median()) / _BINS_PER_MEDIAN
    bins = (negative / -width).clamp(max=_BINS).long()  # bin 0 begins at zero
    cut = _cut(torch.bincount(bins, minlength=_BINS + 1)[:_BINS].tolist())
    if cut is None:
        return 0.0
    share = int((values < -cut * width).sum()) / len(values)
    return share if share <= _LARGEST_SHARE else 0.0


def _cut(counts: list[int]) -> float | None:
    """Where to cut, in bins below zero: half-way from the valley to the peak of the lower mode."""
    lowest, cut = _DEEPEST_VALLEY, None
    for valley, count in enumerate(counts[:-1]):
        peak = max(range(valley + 1, len(counts)), key=counts.__getitem__)
        height = counts[peak]
        is_certain = height - count > _DEVIATIONS * math.sqrt(height + count)
        if is_certain and count < lowest * height:
            lowest, cut = count / height, (valley + peak + 1) / 2
    return cut
