"""Margins: the distribution of the margins, or of another score, of all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ...ops.distribution import BINS, INFINITE_BIN
from ..scored import ScoredBatch
from ..statistics import NEED_TARGET, SCORES
from .arguments import check_by, values_of
from .base import Reduction
from .states import json_number, pack, unpack

if TYPE_CHECKING:
    from ...metrics import MarginDistribution

_CPU = torch.device("cpu")  # whatever the default of the caller is
_NUMBERS = ("counts", "sums", "minimum", "maximum")


class Margins(Reduction):
    """The distribution of the margins, in bins whose width is at most 2^-7 of the margin.

    It is :class:`marginops.metrics.MarginDistribution` of the rows whose values, logits and margin
    are finite. Rows without a label count as ``ignored``.

    The result is a table with a line for each bin that is not empty, in ascending order:
    ``lower`` and ``upper`` (float64, the edges of the bin) and ``count`` (int64). Edges have the
    digits of float32: margins in float64 are rounded to float32 first. The summary holds the fields
    of :class:`marginops.metrics.MarginSummary`, and the number of rows that were left out as
    ``left_out``.

    The object takes 0.5 MiB, a state 12 bytes for each bin that is not empty. Counts do not depend
    on batches and tasks. The sums of margins are float64, and are added in the order of the tasks.

    Args:
        by: The name of the margin, or of another score that :class:`marginops.scoring.Smallest`
            takes. By default ``"margin"`` if the rows have labels, else ``"top2_margin"``.

    Raises:
        TypeError, ValueError: ``by`` has the wrong type or value.

    Example:
        >>> from marginops.scoring import Margins
        >>> Margins().resolved("loss", has_target=True).statistics
        ('margin',)
    """

    name = "margins"

    def __init__(self, by: str | None = None) -> None:
        # torchmetrics takes seconds to import.
        from ...metrics import MarginDistribution

        check_by(by, SCORES)
        self.by = by
        with _CPU:
            self._metric: MarginDistribution = MarginDistribution()
            self._metric.update(torch.empty(0))  # the metric warns if there was no update
        self._counts = {"rows": 0, "left_out": 0}

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistic of the margins."""
        return () if self.by is None else (self.by,)

    def resolved(self, default: str, *, has_target: bool = False) -> Margins:
        """An empty copy that reads the margin or, without labels, the top-2 margin."""
        has_target = has_target or default in NEED_TARGET
        return Margins(self.by or ("margin" if has_target else "top2_margin"))

    def describe(self) -> dict[str, Any]:
        """The class and its argument."""
        return {"class": type(self).__name__, "by": self.by}

    def update(self, scored: ScoredBatch) -> None:
        """Add a batch."""
        margins = values_of(scored, self.by)
        if self.by in NEED_TARGET and scored.target is not None:
            # The margin of a row without a label is infinite already. Other scores are not.
            margins = margins.masked_fill(scored.target == scored.ignore_index, torch.inf)
        margins = margins[scored.is_finite & (margins > -torch.inf)]  # false for NaN
        self._metric.update(margins)
        self._counts["rows"] += len(scored)
        self._counts["left_out"] += len(scored) - len(margins)

    def state(self) -> pa.Table:
        """The counts of the bins that are not empty, and the sums and extremes."""
        counts = self._metric.bin_counts
        bins = counts.nonzero().squeeze(1)
        table = pa.table({"bin": bins.int().numpy(), "count": counts[bins].numpy()})
        numbers: dict[str, Any] = dict(self._counts)
        for name in _NUMBERS:
            # As text, because JSON has no infinities.
            numbers[name] = [
                repr(value) for value in getattr(self._metric, name).reshape(-1).tolist()
            ]
        return pack(self, table, numbers)

    def merge(self, state: pa.Table) -> None:
        """Add a state."""
        numbers = unpack(self, state)
        with _CPU:
            metric_state: dict[str, Any] = dict(self._metric.metric_state)
            for name in _NUMBERS:
                like = metric_state[name]
                number = int if name == "counts" else float
                values = [number(text) for text in numbers[name]]
                metric_state[name] = torch.tensor(values, dtype=like.dtype).reshape(like.shape)
            bins, counts = (
                torch.from_numpy(state[name].to_numpy().copy()) for name in ("bin", "count")
            )
            metric_state["bin_counts"] = torch.zeros(BINS, dtype=torch.int64)
            metric_state["bin_counts"][bins.long()] = counts
            self._metric.merge_state(metric_state)
        for name in self._counts:
            self._counts[name] += numbers[name]

    def result(self) -> pa.Table:
        """The bins that are not empty, in ascending order."""
        counts = self._metric.bin_counts.numpy()
        half = BINS // 2
        # By value: the negative bins from the largest magnitude on, then the others.
        bins = np.concatenate((np.arange(BINS - 1, half - 1, -1), np.arange(half)))
        bins = bins[counts[bins] > 0]
        magnitude, is_negative = bins % half, bins >= half
        near, far = _edge(magnitude), _edge(magnitude + 1)
        lower = np.where(is_negative, -far, near)
        upper = np.where(is_negative, -near, far)
        return pa.table({"lower": lower, "upper": upper, "count": counts[bins]})

    def summary(self) -> dict[str, Any]:
        """The fields of ``MarginSummary``, and the numbers of rows."""
        with _CPU:
            summary = self._metric.compute()
        fields = {name: value.tolist() for name, value in summary._asdict().items()}
        quantiles = zip(summary.probabilities or (), fields["quantiles"], strict=True)
        return {
            "by": self.by,
            **self._counts,
            **{
                name: json_number(value) if isinstance(value, float) else value
                for name, value in fields.items()
            },
            "quantiles": {str(share): json_number(value) for share, value in quantiles},
        }


def _edge(magnitude: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The edge of a bin nearer to 0, from the upper half of its float32."""
    with np.errstate(invalid="ignore"):
        edge = (magnitude.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    edge[magnitude == INFINITE_BIN] = 2.0**128
    edge[magnitude > INFINITE_BIN] = np.inf
    return edge
