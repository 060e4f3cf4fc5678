"""What the metrics compute, and the same as scalars for a logger."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _MarginFields(NamedTuple):
    count: Tensor  # type: ignore[assignment]  # replaces tuple.count
    ignored: Tensor
    mean: Tensor
    minimum: Tensor
    maximum: Tensor
    area: Tensor
    area_cdf: Tensor
    separation: Tensor
    quantiles: Tensor
    support_vectors: Tensor


class MarginSummary(_MarginFields):
    """The result of :class:`marginops.metrics.MarginDistribution`, which describes the fields."""

    #: The probabilities of the quantiles.
    probabilities: tuple[float, ...] | None = None

    def scalars(self) -> dict[str, Tensor]:
        """All values as 0-d tensors, by name, for a logger.

        Returns:
            The 0-d fields by their names, the quantiles as ``quantile_0.05`` and so on, and the
            support vectors as ``support_vectors_1`` (within a factor of 10), ``support_vectors_2``
            (within 100) and so on.

        Raises:
            ValueError: The summary is a copy that does not know the probabilities.

        Example:
            >>> from marginops.metrics import MarginDistribution
            >>> metric = MarginDistribution(quantiles=[0.5], decades=1)
            >>> metric.update(torch.tensor([1.0, 3.0]))
            >>> scalars = metric.compute().scalars()
            >>> list(scalars)[7:], scalars["mean"]
            (['separation', 'quantile_0.5', 'support_vectors_1'], tensor(2., dtype=torch.float64))
        """
        if self.probabilities is None:
            raise ValueError(
                "summary: expected a result of MarginDistribution.compute(), got a copy without "
                "probabilities; set its attribute probabilities"
            )
        return {
            **{name: value for name, value in self._asdict().items() if value.dim() == 0},
            **dict(zip(quantile_names(self.probabilities), self.quantiles.unbind(), strict=True)),
            **{
                f"support_vectors_{decade}": value
                for decade, value in enumerate(self.support_vectors.unbind(), start=1)
            },
        }


class NeuralCollapseSummary(NamedTuple):
    """The result of :class:`marginops.metrics.NeuralCollapse`: 0-d tensors, 0 at full collapse."""

    nc1: Tensor
    nc2_norm_means: Tensor
    nc2_angle_means: Tensor
    nc2_norm_weight: Tensor
    nc2_angle_weight: Tensor
    nc3: Tensor
    nc4: Tensor

    def scalars(self) -> dict[str, Tensor]:
        """The fields by their names, for a logger."""
        return self._asdict()


class ClassManifoldsSummary(NamedTuple):
    """The result of :class:`marginops.metrics.ClassManifolds`, which describes the fields."""

    count: Tensor  # type: ignore[assignment]  # replaces tuple.count
    radius: Tensor
    distance: Tensor

    def scalars(self) -> dict[str, Tensor]:
        """Sums and means over the classes as 0-d tensors, by name, for a logger.

        Returns:
            ``samples``, the number of samples of all classes; ``mean_radius``, the mean over the
            classes that have samples; ``mean_distance``, the mean over the pairs of different
            classes that have samples. A mean over nothing is NaN.

        Example:
            >>> from marginops.metrics import ClassManifolds
            >>> metric = ClassManifolds(num_classes=3, num_features=1, normalize=False)
            >>> metric.update(torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([0, 0, 1]))
            >>> [value.item() for value in metric.compute().scalars().values()]
            [3, 0.5, 6.0]
        """
        seen = self.count > 0
        pairs = (seen.unsqueeze(1) & seen).fill_diagonal_(False)
        return {
            "samples": self.count.sum(),
            "mean_radius": _mean_where(seen, self.radius),
            "mean_distance": _mean_where(pairs, self.distance),
        }


def quantile_names(probabilities: tuple[float, ...]) -> list[str]:
    """The names of quantiles as scalars."""
    return [f"quantile_{probability!r}" for probability in probabilities]


def _mean_where(counts: Tensor, values: Tensor) -> Tensor:
    return torch.where(counts, values, 0).sum() / counts.sum()


class Entry:
    """Takes one field or scalar out of a summary."""

    def __init__(self, name: str) -> None:
        self.__name__ = name  # torchmetrics shows it

    def __call__(self, summary: Any) -> Tensor:
        name = self.__name__
        value: Tensor = (
            getattr(summary, name) if name in summary._fields else summary.scalars()[name]
        )
        return value
