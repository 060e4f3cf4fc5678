"""The data map and the table of what a training run saw of every sample."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import _checks as checks
from ...ops._results import describe
from .values import DynamicsValues

_DRAWN = 25_000
COLUMNS = (
    *("count", "last_step", "margin", "score", "loss", "margin_average", "aum"),
    *("confidence", "variability", "correctness", "el2n", "forgetting", "learnt"),
)


class DataMap(NamedTuple):
    """The data map of Swayamdipta et al. (2020): one point per sample.

    Attributes:
        indices: ``[M]`` int64, the samples that were seen, ascending.
        confidence: ``[M]`` float32, the mean probability of the label over all visits.
        variability: ``[M]`` float32, the standard deviation of this probability.
        correctness: ``[M]`` float32, the share of visits at which the sample was correct.

    Samples with high confidence and low variability are easy, those with high variability are
    ambiguous, and those with low confidence and low variability are hard or mislabelled.
    """

    indices: Tensor
    confidence: Tensor
    variability: Tensor
    correctness: Tensor

    def __repr__(self) -> str:
        return describe(self)

    def plot(self, ax: Any = None, *, highlight: Tensor | None = None) -> tuple[Any, Any]:
        """Draw the confidence over the variability, coloured by the correctness.

        Of more than 25,000 samples the figure shows every second, every third and so on, so that
        at most 25,000 are left. It shows all highlighted samples.

        Args:
            ax: Axes of matplotlib to draw into. By default the method makes new axes.
            highlight: ``[K]`` int64, the indices of samples to draw with a ring, for example
                ``dynamics.label_issues().indices[:100]``.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError, ValueError: ``highlight`` is no tensor of indices.
        """
        rings = None if highlight is None else self._rows(highlight)
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("plot needs matplotlib; run pip install matplotlib") from error
            _, ax = pyplot.subplots(layout="constrained")
        every = -(-len(self.indices) // _DRAWN) or 1
        x, y, colour = (
            value[::every].cpu().numpy()
            for value in (self.variability, self.confidence, self.correctness)
        )
        points = ax.scatter(x, y, c=colour, s=4, cmap="viridis", vmin=0, vmax=1, linewidths=0)
        if rings is not None:
            place = self.variability[rings].cpu().numpy(), self.confidence[rings].cpu().numpy()
            ax.scatter(*place, s=14, facecolors="none", edgecolors="tab:red", linewidths=0.5)
        ax.set(xlabel="variability", ylabel="confidence", ylim=(-0.03, 1.03))
        ax.get_figure().colorbar(points, ax=ax, label="correctness")
        return ax.get_figure(), ax

    def _rows(self, highlight: Any) -> Tensor:
        """The places of the indices in ``self.indices``; samples never seen have none."""
        checks.check_indices("highlight", highlight, "[K]")
        return torch.isin(self.indices, highlight.to(self.indices.device)).nonzero().squeeze(1)


def data_map(dynamics: DynamicsValues) -> DataMap:
    """The data map of dynamics."""
    confidence, variability, correctness = (
        dynamics.confidence,
        dynamics.variability,
        dynamics.correctness,
    )
    seen = (dynamics.count > 0).nonzero().squeeze(1)
    return DataMap(seen, confidence[seen], variability[seen], correctness[seen])


def to_table(dynamics: DynamicsValues) -> Any:
    """All values of dynamics as a table of pyarrow."""
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError('to_table needs pyarrow; run pip install "marginops[tables]"') from error
    columns = {name: getattr(dynamics, name).cpu().numpy() for name in COLUMNS}
    indices = np.arange(len(columns["count"]))
    return pyarrow.table({"index": indices, **columns})
