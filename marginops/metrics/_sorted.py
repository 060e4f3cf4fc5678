"""Sorted margins with their counts, from which quantiles and histograms follow."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.distribution import BINS, INFINITE_BIN


class SortedMargins(NamedTuple):
    """Margins in ascending order, with their counts.

    Attributes:
        values: ``[K]`` float64, ascending.
        starts: ``[K + 1]`` int64. Entry i is the number of margins before ``values[i]``, and the
            last entry is the number of all margins.
    """

    values: Tensor
    starts: Tensor

    @classmethod
    def from_margins(cls, margins: Tensor) -> "SortedMargins":
        """Sort all margins that are not ``+inf``."""
        values = margins[margins != math.inf].sort().values
        return cls(values, torch.arange(len(values) + 1, device=values.device))

    @classmethod
    def from_bins(cls, bin_counts: Tensor, minimum: Tensor, maximum: Tensor) -> "SortedMargins":
        """Take the middle of each bin for its margins.

        The bins next to 0 stand for 0, and the bins beyond the range of float32 for infinities.
        """
        bins = torch.arange(BINS, dtype=torch.int32, device=bin_counts.device)
        half = BINS // 2
        bins = torch.cat((bins[half:].flip(0), bins[:half]))  # ascending by value
        magnitude = bins & (half - 1)
        values = (bins << 16 | 0x8000).view(torch.float32).double()
        values = torch.where(magnitude == 0, 0, values).clamp(minimum, maximum)
        infinity = torch.where(bins < half, math.inf, -math.inf).double()
        values = torch.where(magnitude >= INFINITE_BIN, infinity, values)
        starts = bin_counts.new_zeros(BINS + 1)
        starts[1:] = bin_counts[bins.long()].cumsum(0)
        return cls(values, starts)

    def below(self, thresholds: Tensor) -> Tensor:
        """The number of margins below each threshold."""
        return self.starts[torch.searchsorted(self.values, thresholds)]

    def quantiles(self, probabilities: Sequence[float]) -> Tensor:
        """Interpolate linearly between the margins next to rank p (n - 1); NaN without margins."""
        if len(self.values) == 0:
            return self.values.new_full((len(probabilities),), math.nan)
        share = torch.tensor(probabilities, dtype=torch.float64, device=self.values.device)
        rank = share * (self.starts[-1] - 1).clamp(min=0)
        lower, upper = self._at_rank(rank.floor()), self._at_rank(rank.ceil())
        fraction = rank - rank.floor()
        between = (1 - fraction) * lower + fraction * upper
        between = torch.where(lower == upper, lower, between)
        return torch.where(self.starts[-1] == 0, math.nan, between)

    def _at_rank(self, rank: Tensor) -> Tensor:
        index = torch.searchsorted(self.starts[1:], rank.long(), right=True)
        return self.values[index.clamp(max=len(self.values) - 1)]

    def histogram(self, edges: Tensor) -> Tensor:
        """The number of margins between neighbouring edges.

        The outer bins also count the margins below the first edge and above the last one.
        """
        bins = len(edges) - 1
        index = (torch.searchsorted(edges, self.values, right=True) - 1).clamp(0, bins - 1)
        return self.starts.new_zeros(bins).index_add_(0, index, self.starts.diff())

    def curve(self) -> tuple[Tensor, Tensor]:
        """Rank and value of every distinct margin.

        The rank is a share of all margins. Equal margins have one rank, the middle of theirs.
        """
        occurs = self.starts.diff() > 0
        ranks = (self.starts[1:] + self.starts[:-1]).double() / 2 / self.starts[-1]
        return ranks[occurs], self.values[occurs]
