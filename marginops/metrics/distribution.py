"""The distribution of the margins of a whole data set, computed batch by batch."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from .. import _checks as checks
from ..ops.distribution import (
    BINS,
    decade_thresholds,
    update_margin_distribution_op,
)
from . import _shared as shared
from ._margin_state import margin_fault
from ._sorted import SortedMargins
from ._state import CheckedMetric, State
from ._summaries import MarginSummary, quantile_names

_SUMS = ("bin_counts", "counts", "sums", "minimum", "maximum")
_HINT = "pass marginops.classification_margin(logits, target)"


class MarginDistribution(CheckedMetric):
    r"""The distribution of all margins of a data set: summary, histogram and plot.

    ``compute()`` returns a :class:`marginops.metrics.MarginSummary`. Its fields are 0-d tensors
    unless a shape is given. Counts are int64. All other fields are float64 and, except for
    ``separation``, in units of the margins:

    =================== =======================================================================
    ``count``           the number of margins, without those of ``+inf``
    ``ignored``         the number of margins of ``+inf``, which ignored samples have; no other
                        field counts them
    ``mean``            the mean margin
    ``minimum``         the smallest margin
    ``maximum``         the largest margin
    ``area``            :func:`marginops.margin_area`, rank form, which equals ``mean``
    ``area_cdf``        :func:`marginops.margin_area`, CDF form
    ``separation``      the share of margins > 0, which is the share of correct samples
    ``quantiles``       ``[Q]``, interpolated linearly as in ``numpy.quantile``
    ``support_vectors`` ``[decades]`` int64, :func:`marginops.support_vector_counts`
    =================== =======================================================================

    The areas are those of Banburski et al. (2021), the support vectors those of Lyu, Li (2020).

    If a margin is NaN, or if there are no margins, the float64 fields are NaN and
    ``support_vectors`` is 0. A margin of ``-inf`` counts as any other margin.

    The state takes 0.5 MiB for any number of margins. It holds sums in float64, the extremes, and
    the counts of 2^16 bins. The bin of a margin is the upper half of its float32. So a bin is at
    most 2^-7 of its margins wide, at any scale in the range of float32. The middle of a bin stands
    for all margins in it. All results are exact up to rounding in float64, with two exceptions:

    * ``quantiles`` are interpolated between sorted margins. Each of these is off by at most 0.4 %
      of itself, or by 1e-38 if it is subnormal in float32. Beyond the range of float32 it is
      infinite.
    * ``support_vectors`` counts margins below thresholds that are off by at most 0.4 % of
      themselves.

    With ``exact=True`` both are exact as well, for 8 more bytes per margin.

    Args:
        exact: Keep all margins in float64.
        quantiles: Probabilities in [0, 1], at least one.
        decades: The number of powers of ten for ``support_vectors``, >= 1.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or value.

    The metric adds up the states of ``forward``, ``merge_state`` and processes. The state is part
    of ``state_dict``. The order of the margins and the device do not change the counts, and they
    change the sums only by rounding errors. ``update`` does not wait for the GPU. The results have
    no gradients.

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
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    own_states = (*_SUMS, "margins")

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
        super().__init__({"exact": exact}, **kwargs)
        self.exact = exact
        self.quantiles = _as_probabilities(quantiles)
        self.decades = decades

        def add(name: str, default: Tensor | list[Tensor], reduction: str) -> None:
            self.add_state(name, default, dist_reduce_fx=reduction, persistent=True)

        add("bin_counts", torch.zeros(BINS, dtype=torch.int64), "sum")
        add("counts", torch.zeros(2, dtype=torch.int64), "sum")  # ignored, positive
        add("sums", torch.zeros(2, dtype=torch.float64), "sum")  # all margins, positive margins
        add("minimum", torch.tensor(math.inf, dtype=torch.float64), "min")
        add("maximum", torch.tensor(-math.inf, dtype=torch.float64), "max")
        if exact:
            add("margins", [], "cat")

    def update(self, margins: Tensor, *others: Any) -> None:
        """Add the margins of a batch.

        Args:
            margins: ``[N]``, float32, float64, bfloat16 or float16, any stride, on the device of
                the metric.
            others: Nothing. Logits and targets are the arguments of
                :func:`marginops.classification_margin`, which computes the margins.

        Raises:
            TypeError, ValueError: ``margins`` has the wrong type, dtype, shape or device.
        """
        if others:
            raise TypeError(
                f"margins: expected one tensor [N], got {1 + len(others)} arguments; {_HINT}"
            )
        if isinstance(margins, Tensor) and margins.dim() == 2 and margins.shape[1] != 1:
            raise ValueError(f"margins: expected shape [N], got {list(margins.shape)}; {_HINT}")
        checks.check_tensor("margins", margins, 1, "[N]")
        checks.check_device("margins", margins, self.bin_counts, "the metric")
        margins = margins.detach()
        if self.bin_counts.is_inference() and not torch.is_inference_mode_enabled():
            for name in _SUMS:  # a tensor of inference mode cannot change outside of that mode
                setattr(self, name, getattr(self, name).clone())
        update_margin_distribution_op(*(getattr(self, name) for name in _SUMS), margins)
        if self.exact:
            self.margins.append(margins.to(torch.float64, copy=True))

    def compute(self) -> MarginSummary:
        """Summarize all margins so far, of all processes.

        Returns:
            :class:`marginops.metrics.MarginSummary`.
        """
        margins = self._sorted()
        count = margins.starts[-1]
        # The margins may be on the CPU alone (compute_on_cpu).
        counts, sums, minimum, maximum = (
            state.to(count.device) for state in (self.counts, self.sums, self.minimum, self.maximum)
        )
        mean, positive_mean = (sums / count).unbind()
        # NaN if there are no margins or if one is NaN.
        undefined = torch.where((count == 0) | minimum.isnan(), math.nan, 0.0).double()
        area_cdf = (maximum.clamp(min=0) - positive_mean).clamp(min=0)
        below = margins.below(decade_thresholds(minimum, self.decades))
        return MarginSummary(
            count=count,
            ignored=counts[0],
            mean=mean,
            minimum=minimum + undefined,
            maximum=maximum + undefined,
            area=mean,
            area_cdf=area_cdf + undefined,
            separation=counts[1] / count.double() + undefined,
            quantiles=margins.quantiles(self.quantiles) + undefined,
            support_vectors=torch.where(undefined.isnan(), 0, below),
        )

    def histogram(self, bins: int = 50) -> tuple[Tensor, Tensor]:
        """Count the margins in bins of equal width, as ``numpy.histogram`` does.

        Args:
            bins: The number of bins, >= 1.

        Returns:
            Counts ``[bins]`` int64 and edges ``[bins + 1]`` float64, from the smallest margin to
            the largest. Without ``exact``, a margin within 0.4 % of an edge may count on the other
            side of it.

        Raises:
            TypeError, ValueError: ``bins`` is not an int >= 1, a margin is not finite, or there
                are no margins.
        """
        checks.check_int("bins", bins, 1)
        with self._synced():
            least, largest = float(self.minimum), float(self.maximum)
            if not math.isfinite(largest - least):
                raise ValueError(
                    f"margins: expected finite margins for a histogram, got {least} to {largest}"
                )
            if least == largest:
                least, largest = least - 0.5, largest + 0.5
            margins = self._sorted()
        device = margins.values.device
        edges = torch.linspace(least, largest, bins + 1, dtype=torch.float64, device=device)
        return margins.histogram(edges), edges

    def plot(
        self,
        val: MarginSummary | Sequence[MarginSummary] | None = None,
        ax: Any = None,
        *,
        kind: str = "rank",
        bins: int = 50,
    ) -> tuple[Any, Any]:
        """Plot the margins, or a series of summaries.

        Args:
            val: One or several results of ``compute()`` or ``forward()``. If it is given, the plot
                shows their quantiles over the steps, else the margins of the metric.
            ax: Axes of matplotlib to draw into. By default the method makes new axes.
            kind: ``"rank"`` for the sorted margins over their rank, or ``"histogram"``.
            bins: The number of bins of the histogram.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError, ValueError: ``val`` holds anything else, or nothing.
            ValueError: ``kind`` is unknown, or a histogram is wanted and a margin is not finite or
                there are no margins.
        """
        checks.check_choice("kind", kind, ("rank", "histogram"))
        ax = shared.new_axes(ax)
        if val is not None:
            summaries = shared.as_series(val, MarginSummary)
            lines = torch.stack([summary.quantiles for summary in summaries]).cpu()
            ax.plot(lines.numpy(), marker="o", label=[f"{q:g}" for q in self.quantiles])
            ax.legend(title="quantile")
            ax.set(xlabel="step", ylabel="margin")
        elif kind == "rank":
            with self._synced():
                ranks, margins = self._sorted().curve()
            ax.plot(ranks.cpu().numpy(), margins.cpu().numpy())
            ax.set(xlabel="rank / number of margins", ylabel="margin")
        else:
            counts, edges = self.histogram(bins)
            ax.stairs(counts.cpu().numpy(), edges.cpu().numpy(), fill=True)
            ax.set(xlabel="margin", ylabel="number of margins")
        return ax.get_figure(), ax

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the kept margins, float64. No conversion of the metric changes it."""
        return torch.float64

    def _synced(self) -> Any:
        """A context in which the state is that of all processes, as in ``compute``."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute)

    def _sorted(self) -> SortedMargins:
        if not self.exact:
            return SortedMargins.from_bins(self.bin_counts, self.minimum, self.maximum)
        kept: Tensor = dim_zero_cat(self.margins) if len(self.margins) else self.sums[:0]
        return SortedMargins.from_margins(kept)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        # torchmetrics makes results of one element 0-d.
        wrapped = super()._wrap_compute(compute)

        @functools.wraps(compute)
        def compute_in_shape() -> MarginSummary:
            summary = wrapped()
            summary = summary._replace(
                quantiles=summary.quantiles.reshape(-1),
                support_vectors=summary.support_vectors.reshape(-1),
            )
            summary.probabilities = self.quantiles
            return summary

        return compute_in_shape

    def _entries(self) -> list[str]:
        decades = (f"support_vectors_{decade}" for decade in range(1, self.decades + 1))
        return [*MarginSummary._fields, *quantile_names(self.quantiles), *decades]

    def _merged(self, earlier: State, later: State) -> State:
        return {}  # torchmetrics adds, joins and compares these states

    def _value_fault(self, state: Mapping[str, Any]) -> str | None:
        return margin_fault({name: state[name] for name in _SUMS}, state.get("margins"))


def _as_probabilities(quantiles: Any) -> tuple[float, ...]:
    try:
        probabilities = tuple(float(quantile) for quantile in quantiles)
    except (TypeError, ValueError) as error:
        raise TypeError(f"quantiles: expected a sequence of floats, got {quantiles!r}") from error
    if not probabilities or not all(0 <= probability <= 1 for probability in probabilities):
        raise ValueError(f"quantiles: expected probabilities in [0, 1], got {quantiles!r}")
    return probabilities
