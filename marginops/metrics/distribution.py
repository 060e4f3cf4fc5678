"""The distribution of the margins of a whole data set, from its batches."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from .. import _checks as checks
from ..ops.distribution import (
    BINS,
    decade_thresholds,
    update_margin_distribution_op,
)
from ._shared import FixedDtypeMetric
from ._sorted import SortedMargins

_STATE = ("bin_counts", "counts", "sums", "minimum", "maximum")


class MarginSummary(NamedTuple):
    """What :class:`MarginDistribution` computes; see there."""

    count: Tensor  # type: ignore[assignment]
    ignored: Tensor
    mean: Tensor
    minimum: Tensor
    maximum: Tensor
    area: Tensor
    area_cdf: Tensor
    separation: Tensor
    quantiles: Tensor
    support_vectors: Tensor


class MarginDistribution(FixedDtypeMetric):
    r"""The distribution of all margins that it has seen: a few numbers, a histogram, a plot.

    ``compute()`` gives a :class:`MarginSummary` of 0-d tensors unless said otherwise, float64 but
    for the numbers of margins, which are int64:

    =================== =======================================================================
    ``count``           how many margins there were, those of ``+inf`` left out
    ``ignored``         how many were ``+inf``, as ignored samples are; they count nowhere else
    ``mean``            their mean
    ``minimum``         the smallest
    ``maximum``         the largest
    ``area``            :func:`marginops.margin_area`, rank form: the same as ``mean``
    ``area_cdf``        :func:`marginops.margin_area`, CDF form
    ``separation``      the share of margins > 0: of samples classified correctly
    ``quantiles``       ``[Q]``, interpolated linearly between neighbours as by numpy.quantile
    ``support_vectors`` ``[decades]``, :func:`marginops.support_vector_counts`
    =================== =======================================================================

    A margin that is NaN makes all these NaN, but for the numbers of margins, where
    ``support_vectors`` becomes 0; so do no margins at all. ``-inf`` is a margin like others.

    The state is 0.5 MiB whatever the number of margins: sums in float64, extremes, and how many
    margins fall into each of 2^16 bins, which are the upper halves of their float32. So a bin is
    at most 2^-7 of its margins wide at any scale that float32 has, and its middle stands for all
    in it. All results are exact up to rounding in float64, except that

    * the k-th smallest margin, of which ``quantiles`` are made, is off by 0.4 % of itself at most
      (by 1e-38 if it is subnormal in float32), and infinite beyond the range of float32;
    * ``support_vectors`` are counts below thresholds that are off by 0.4 % of themselves at most.

    With ``exact=True`` these are exact as well, for 8 bytes more a margin.

    Args:
        exact: Keep all margins, in float64.
        quantiles: Probabilities in [0, 1], at least one.
        decades: How many powers of ten for ``support_vectors``, >= 1.
        kwargs: Those of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or value.

    The state adds up over ``forward``, ``merge_state`` and processes, and is in ``state_dict``.
    The bins and numbers are the same in any order of the margins and on every device; sums are so
    up to rounding. ``update`` does not synchronise with a GPU. No gradients.

    Example:
        >>> from marginops.metrics import MarginDistribution
        >>> metric = MarginDistribution(quantiles=[0.5])
        >>> metric.update(torch.tensor([-1.0, 1.0]))
        >>> metric.update(torch.tensor([3.0, torch.inf]))
        >>> summary = metric.compute()
        >>> summary.count, summary.ignored, summary.support_vectors
        (tensor(3), tensor(1), tensor([2, 3, 3]))
        >>> summary.mean, summary.separation
        (tensor(1., dtype=torch.float64), tensor(0.6667, dtype=torch.float64))

    Areas are those of Banburski et al. (2021), support vectors those of Lyu & Li (2020).
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    bin_counts: Tensor
    counts: Tensor
    sums: Tensor
    minimum: Tensor
    maximum: Tensor
    margins: list[Tensor]

    def __init__(
        self,
        *,
        exact: bool = False,
        quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
        decades: int = 3,
        **kwargs: Any,
    ) -> None:
        if not isinstance(exact, bool):
            raise TypeError(f"exact: expected a bool, got {type(exact).__name__}")
        checks.check_int("decades", decades, 1)
        super().__init__(**kwargs)
        self.exact = exact
        self.quantiles = _as_probabilities(quantiles)
        self.decades = decades

        def add(name: str, default: Tensor | list[Tensor], reduction: str) -> None:
            self.add_state(name, default, dist_reduce_fx=reduction, persistent=True)

        add("bin_counts", torch.zeros(BINS, dtype=torch.int64), "sum")
        add("counts", torch.zeros(2, dtype=torch.int64), "sum")  # ignored, positive
        add("sums", torch.zeros(2, dtype=torch.float64), "sum")  # of all, of the positive
        add("minimum", torch.tensor(math.inf, dtype=torch.float64), "min")
        add("maximum", torch.tensor(-math.inf, dtype=torch.float64), "max")
        if exact:
            add("margins", [], "cat")

    def update(self, margins: Tensor) -> None:
        """Add a batch.

        Args:
            margins: ``[N]``, float32, float64, bfloat16 or float16, any stride, on the device of
                the metric.
        """
        checks.check_tensor("margins", margins, 1, "[N]")
        checks.check_device("margins", margins, self.bin_counts, "the metric")
        margins = margins.detach()
        if self.bin_counts.is_inference() and not torch.is_inference_mode_enabled():
            for name in _STATE:  # tensors made in inference mode may only change there
                setattr(self, name, getattr(self, name).clone())
        update_margin_distribution_op(*(getattr(self, name) for name in _STATE), margins)
        if self.exact:
            self.margins.append(margins.double())

    def compute(self) -> MarginSummary:
        """The numbers that describe all margins so far, of all processes."""
        margins = self._sorted()
        count = margins.starts[-1]
        mean, positive_mean = (self.sums / count).unbind()
        # NaN without margins, and as soon as one is NaN.
        undefined = torch.where((count == 0) | self.minimum.isnan(), math.nan, 0.0).double()
        area_cdf = (self.maximum.clamp(min=0) - positive_mean).clamp(min=0)
        below = margins.below(decade_thresholds(self.minimum, self.decades))
        return MarginSummary(
            count=count,
            ignored=self.counts[0],
            mean=mean,
            minimum=self.minimum + undefined,
            maximum=self.maximum + undefined,
            area=mean,
            area_cdf=area_cdf + undefined,
            separation=self.counts[1] / count.double() + undefined,
            quantiles=margins.quantiles(self.quantiles) + undefined,
            support_vectors=torch.where(undefined.isnan(), 0, below),
        )

    def histogram(self, bins: int = 50) -> tuple[Tensor, Tensor]:
        """How many margins lie in bins of equal width, as by ``numpy.histogram``.

        Args:
            bins: How many, >= 1.

        Returns:
            Numbers ``[bins]`` int64 and edges ``[bins + 1]`` float64, from the smallest margin to
            the largest. Without ``exact``, margins within 0.4 % of an edge may fall on its other
            side.

        Raises:
            TypeError, ValueError: ``bins`` is not such a number; or the margins are not all
                finite, or there are none.
        """
        checks.check_int("bins", bins, 1)
        with self._synced():
            least, largest = float(self.minimum), float(self.maximum)
            if not math.isfinite(largest - least):
                raise ValueError(
                    f"margins: expected finite ones for a histogram, got {least} to {largest}"
                )
            if least == largest:
                least, largest = least - 0.5, largest + 0.5
            margins = self._sorted()
        edges = torch.linspace(least, largest, bins + 1, dtype=torch.float64, device=self.device)
        return margins.histogram(edges), edges

    def plot(
        self,
        val: MarginSummary | Sequence[MarginSummary] | None = None,
        ax: Any = None,
        *,
        kind: str = "rank",
        bins: int = 50,
    ) -> tuple[Any, Any]:
        """Plot the margins, or summaries of them.

        Args:
            val: Results of ``compute()`` or ``forward()``: their quantiles, one after the other.
                Without them all margins are plotted.
            ax: Axes of matplotlib to draw into; new ones without.
            kind: ``"rank"``, the sorted margins against their rank, or ``"histogram"``.
            bins: Of the histogram.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: There is no matplotlib.
            ValueError: ``kind`` is unknown, or the margins have no histogram.
        """
        checks.check_choice("kind", kind, ("rank", "histogram"))
        try:
            from matplotlib import pyplot
        except ModuleNotFoundError as error:
            raise ImportError("plot needs matplotlib: pip install matplotlib") from error
        if ax is None:
            _, ax = pyplot.subplots()
        if val is not None:
            summaries = [val] if isinstance(val, MarginSummary) else list(val)
            lines = torch.stack([summary.quantiles for summary in summaries]).cpu()
            ax.plot(lines.numpy(), marker="o", label=[f"{q:g}" for q in self.quantiles])
            ax.legend(title="quantile")
            ax.set(xlabel="step", ylabel="margin")
        elif kind == "rank":
            with self._synced():
                ranks, margins = self._sorted().curve()
            ax.plot(ranks.cpu().numpy(), margins.cpu().numpy())
            ax.set(xlabel="rank / number", ylabel="margin")
        else:
            numbers, edges = self.histogram(bins)
            ax.stairs(numbers.cpu().numpy(), edges.cpu().numpy(), fill=True)
            ax.set(xlabel="margin", ylabel="number")
        return ax.get_figure(), ax

    @property
    def dtype(self) -> torch.dtype:
        """That of margins which are kept; no conversion of modules changes it."""
        return torch.float64

    def _synced(self) -> Any:
        """Within, the state is that of all processes, as it is in ``compute``."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute)

    def _sorted(self) -> SortedMargins:
        if not self.exact:
            return SortedMargins.from_bins(self.bin_counts, self.minimum, self.maximum)
        kept: Tensor = dim_zero_cat(self.margins) if len(self.margins) else self.sums[:0]
        return SortedMargins.from_margins(kept)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics takes the dimension from results of one element.
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def compute_in_shape() -> MarginSummary:
            summary = wrapped()
            return summary._replace(
                quantiles=summary.quantiles.reshape(-1),
                support_vectors=summary.support_vectors.reshape(-1),
            )

        return compute_in_shape

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # Copies: updates are in place, and what is loaded remains the caller's.
        device = self.bin_counts.device
        for key in (prefix + name for name in self._defaults):
            value = state_dict.get(key)
            if isinstance(value, Tensor):
                state_dict[key] = value.to(device, copy=True)
            elif value is not None:
                state_dict[key] = [kept.to(device, copy=True) for kept in value]
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _as_probabilities(quantiles: Any) -> tuple[float, ...]:
    try:
        probabilities = tuple(float(quantile) for quantile in quantiles)
    except (TypeError, ValueError) as error:
        raise TypeError(f"quantiles: expected a sequence of floats, got {quantiles!r}") from error
    if not probabilities or not all(0 <= probability <= 1 for probability in probabilities):
        raise ValueError(f"quantiles: expected probabilities in [0, 1], got {quantiles!r}")
    return probabilities
