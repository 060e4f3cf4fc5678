"""Counts, means and scatter of classes, from which neural collapse follows."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.moments import class_moments


class Scatter(NamedTuple):
    """The sums from which neural collapse follows.

    Attributes:
        samples: ``[C]`` int64, the number of samples of each class.
        mean: ``[C, D]`` float64, the mean of each class, 0 for a class without samples.
        within: ``[D, D]`` float64, the sum of the outer products of all deviations from the class
            means. The sum is symmetric. Only its upper triangle is computed; some entries below
            the diagonal are 0. None if the sum is not needed.
    """

    samples: Tensor
    mean: Tensor
    within: Tensor | None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Scatter":
        """The sums in the state of a metric."""
        return cls(state["count"], state["mean"], state.get("within_scatter"))

    def state(self) -> dict[str, Tensor]:
        """The sums as the state of a metric."""
        state = {"count": self.samples, "mean": self.mean}
        return state if self.within is None else {**state, "within_scatter": self.within}

    def add(self, input: Tensor, target: Tensor, ignore_index: int) -> "Scatter":
        """Add the samples of a batch."""
        # On the CPU one part of a large batch fits into the cache.
        size = max(1, len(input)) if input.is_cuda else max(2048, 4 * len(self.samples))
        merged = self
        for rows, classes in zip(input.split(size), target.split(size), strict=True):
            merged = merged._add_part(rows.double(), classes, ignore_index)
        return merged

    def _add_part(self, input: Tensor, target: Tensor, ignore_index: int) -> "Scatter":
        samples, mean, _ = class_moments(
            input, target, len(self.samples), ignore_index=ignore_index
        )
        mean.masked_fill_((samples == 0).unsqueeze(1), 0)
        merged = self._with_means(samples, mean)
        if merged.within is None:
            return merged
        ignored = target == ignore_index
        deviation = input - mean.index_select(0, torch.where(ignored, 0, target))
        deviation.masked_fill_(ignored.unsqueeze(1), 0)
        _add_product(merged.within, deviation)
        return merged

    def merge(self, other: "Scatter") -> "Scatter":
        """Merge the sums of two sets of samples (Chan, Golub, LeVeque, 1979)."""
        merged = self._with_means(other.samples, other.mean)
        if merged.within is not None and other.within is not None:
            merged.within.add_(other.within)
        return merged

    def _with_means(self, other_samples: Tensor, other_mean: Tensor) -> "Scatter":
        """Merge with samples that lie on their class means."""
        samples = self.samples + other_samples
        share = (other_samples.double() / samples.clamp(min=1)).unsqueeze(1)
        step = other_mean - self.mean
        within = self.within
        if within is not None:
            within = within.clone()
            _add_product(within, (self.samples.unsqueeze(1) * share).sqrt() * step)
        return Scatter(samples, torch.addcmul(self.mean, share, step), within)

    def means(self) -> Tensor:
        """The mean of each class, NaN for a class without samples."""
        return torch.where((self.samples == 0).unsqueeze(1), torch.nan, self.mean)

    def symmetric_within(self) -> Tensor:
        """``within`` with all its entries."""
        assert self.within is not None
        return self.within.triu() + self.within.triu(1).T


def _add_product(upper: Tensor, rows: Tensor) -> None:
    """Add the upper triangle of ``rows^T rows``, and of the entries below it as few as possible."""
    columns = rows.shape[1]
    width = max(64, columns // 4)
    for first in range(0, columns, width):
        upper[first : first + width, first:].addmm_(
            rows[:, first : first + width].T, rows[:, first:]
        )
