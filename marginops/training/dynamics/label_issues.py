"""Which labels may be wrong, from the dynamics of one training run."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _checks as checks
from ...ops._results import describe
from .values import DynamicsValues

_SCORES = ("aum", "confidence", "margin_average", "margin", "correctness")


class LabelIssues(NamedTuple):
    """Samples by suspicion of their labels.

    :meth:`marginops.training.TrainingDynamics.label_issues` makes it.

    Attributes:
        indices: ``[M]`` int64, the samples that were seen, the most suspicious first. Those whose
            last margin is NaN are the last ones of the order by ``"margin"``.
        scores: ``[M]`` float32, their scores, ascending.
        threshold: The score below which a label counts as wrong; None without threshold samples.
        num_issues: The number of scores below ``threshold``, so ``indices[:num_issues]`` are the
            samples with wrong labels; None without threshold samples.
    """

    indices: Tensor
    scores: Tensor
    threshold: float | None
    num_issues: int | None

    def __repr__(self) -> str:
        return describe(self)


class ThresholdSamples(NamedTuple):
    """Samples whose label is certainly wrong, from :func:`marginops.training.threshold_samples`.

    Attributes:
        indices: ``[K]`` int64, these samples, ascending.
        target: ``[N]`` int64, the labels to train with: ``num_classes`` for these samples, and the
            given label for all others.
    """

    indices: Tensor
    target: Tensor

    def __repr__(self) -> str:
        return describe(self)


def threshold_samples(
    target: Tensor, num_classes: int, *, num_samples: int | None = None, seed: int = 0
) -> ThresholdSamples:
    """Give random samples one more class, which is wrong for all of them (Pleiss et al., 2020).

    A network with C + 1 outputs learns these samples only by heart, as it does those whose label is
    wrong. So their area under the margin tells where wrong labels begin. Train with the returned
    ``target``, and pass ``indices`` to :meth:`marginops.training.TrainingDynamics.label_issues`.

    Args:
        target: ``[N]`` int64, the labels.
        num_classes: The number of classes C, without the one that is added.
        num_samples: How many samples get the class, in [1, N). The default is N // (C + 1), as in
            the paper: as many as a class has.
        seed: The seed of the choice.

    Returns:
        :class:`marginops.training.ThresholdSamples` on the device of ``target``.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value, or a label is not in [0, C).

    The labels of these samples are not judged. The paper trains twice, with two choices, to judge
    all: pass a second ``seed``. The choice is the same on every device.

    Example:
        >>> import torch
        >>> from marginops.training import threshold_samples
        >>> indices, target = threshold_samples(torch.arange(12) % 3, num_classes=3)
        >>> len(indices), target[indices]
        (3, tensor([3, 3, 3]))
    """
    checks.check_indices("target", target, "[N]")
    checks.check_int("num_classes", num_classes, 1)
    checks.check_int("seed", seed, 0)
    outside = target[(target < 0) | (target >= num_classes)]
    if len(outside):
        raise ValueError(f"target: expected classes in [0, {num_classes}), got {int(outside[0])}")
    count = len(target) // (num_classes + 1) if num_samples is None else num_samples
    checks.check_int("num_samples", count)
    if not 1 <= count < len(target):
        raise ValueError(
            f"num_samples: expected 1 to {len(target) - 1} of {len(target)} samples, got {count}"
        )
    random = torch.Generator("cpu").manual_seed(seed)
    chosen = torch.randperm(len(target), generator=random, device="cpu")[:count].sort().values
    chosen = chosen.to(target.device)
    return ThresholdSamples(chosen, target.index_fill(0, chosen, num_classes))


def label_issues(
    dynamics: DynamicsValues, by: Any, threshold_samples: Any, percentile: Any
) -> LabelIssues:
    """See :meth:`marginops.training.TrainingDynamics.label_issues`."""
    checks.check_choice("by", by, _SCORES)
    scores, is_judged = getattr(dynamics, by), dynamics.count > 0
    threshold = None
    if threshold_samples is not None:
        chosen = _checked_samples(threshold_samples, is_judged & scores.isfinite())
        threshold = float(np.percentile(scores[chosen].cpu().numpy(), _checked(percentile)))
        is_judged[chosen] = False
    indices = is_judged.nonzero().squeeze(1)
    scores, order = scores[indices].sort(stable=True)
    count = None if threshold is None else int((scores < threshold).sum())
    return LabelIssues(indices[order], scores, threshold, count)


def _checked_samples(chosen: Any, has_score: Tensor) -> Tensor:
    """Check that threshold samples are samples with a finite score."""
    checks.check_indices("threshold_samples", chosen, "[K]")
    chosen = chosen.to(has_score.device)
    if len(chosen) == 0:
        raise ValueError("threshold_samples: expected at least one sample, got none")
    outside = chosen[(chosen < 0) | (chosen >= len(has_score))]
    if len(outside):
        raise ValueError(
            f"threshold_samples: expected values in [0, {len(has_score)}), got {int(outside[0])}"
        )
    missing = chosen[~has_score[chosen]]
    if len(missing):
        raise ValueError(
            f"threshold_samples: expected samples with a finite score, and {len(missing)} have "
            f"none, such as {int(missing[0])}; train at least one epoch"
        )
    return chosen


def _checked(percentile: Any) -> float:
    if isinstance(percentile, bool) or not isinstance(percentile, (int, float)):
        raise TypeError(f"percentile: expected a float, got {type(percentile).__name__}")
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile: expected a value in [0, 100], got {percentile}")
    return float(percentile)
