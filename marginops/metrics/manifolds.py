"""The radius of every class in the output of a layer, and the distances between classes."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ..ops.moments import ClassMoments, class_moments
from . import _shared as shared
from ._state import CheckedMetric, State
from ._summaries import ClassManifoldsSummary

_ON_SPHERE = 1 + 1e-3  # lengths on the unit sphere are at most 1, up to rounding


class ClassManifolds(CheckedMetric):
    r"""Gyration radius of every class and the distances between the class means.

    Let :math:`z = h / \lVert h \rVert_2` be the features scaled to the unit sphere, or h itself
    without ``normalize``. Let :math:`m_c` be their mean over class c:

    ============ ==================================================================================
    ``count``    ``[C]`` int64, the number of samples of each class
    ``radius``   ``[C]``, :math:`R_c = \sqrt{\mathrm{mean}_{y = c} \lVert z - m_c \rVert_2^2}`
    ``distance`` ``[C, C]``, :math:`\lVert m_c - m_{c'} \rVert_2`
    ============ ==================================================================================

    These are the class manifolds of Ciceri et al. (2024). In training their radii shrink and then
    grow again, see :class:`marginops.training.InversionMonitor`. On the sphere
    :math:`R_c^2 = 1 - \lVert m_c \rVert_2^2`, but this difference cancels for small radii. The
    metric does not compute the radius from it.

    Args:
        num_classes: C >= 2.
        num_features: D >= 1.
        normalize: Whether features are scaled to the unit sphere. A row of zeros stays zero.
        ignore_index: Samples with this target do not count.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: A number has the wrong type or is too small.

    Radius and distance are float64. They are NaN for a class without samples, and in units of the
    features unless ``normalize`` is set. :func:`marginops.class_moments` computes the moments of a
    batch, in float64 for float64 features, else in float32. Batches and processes are merged in
    float64. So a class of equal points has radius 0 in one batch. Over several batches, with
    ``normalize``, its radius is at most the rounding error of z.

    ``update`` and ``compute`` do not wait for the device, except to compare the arguments of
    several processes. The state takes C (D + 2) numbers for any number of samples, and is part of
    ``state_dict``.

    Example:
        >>> import torch
        >>> from marginops.metrics import ClassManifolds
        >>> metric = ClassManifolds(num_classes=2, num_features=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]))
        >>> metric.update(torch.tensor([[-1.0, 0.0], [-3.0, 0.0]]), torch.tensor([1, 1]))
        >>> summary = metric.compute()
        >>> summary.count, summary.radius
        (tensor([2, 2]), tensor([0.7071, 0.0000], dtype=torch.float64))
        >>> summary.distance[0, 1]
        tensor(1.5811, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    own_states = ("count", "mean", "radius")

    count: Tensor
    mean: Tensor
    radius: Tensor

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        normalize: bool = True,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        checks.check_int("num_classes", num_classes, 2)
        checks.check_int("num_features", num_features, 1)
        if not isinstance(normalize, bool):
            raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
        checks.check_int("ignore_index", ignore_index)
        arguments = {
            "num_classes": num_classes,
            "num_features": num_features,
            "normalize": normalize,
            "ignore_index": ignore_index,
        }
        super().__init__(arguments, **kwargs)
        self.num_classes, self.num_features = num_classes, num_features
        self.normalize, self.ignore_index = normalize, ignore_index
        # The moments of empty classes, which merging leaves out.
        mean = torch.full((num_classes, num_features), torch.nan, dtype=torch.float64)
        self.add_state("count", torch.zeros(num_classes, dtype=torch.int64), persistent=True)
        self.add_state("mean", mean, persistent=True)
        self.add_state("radius", mean[:, 0].clone(), persistent=True)

    def update(self, input: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            input: ``[N, D]`` features, float32, float64, bfloat16 or float16.
            target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
            RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
                assertion.
        """
        shared.check_columns("input", input, "N", self.num_features, self.count.device)
        batch = class_moments(
            input.detach(),
            target,
            self.num_classes,
            normalize=self.normalize,
            ignore_index=self.ignore_index,
        )
        merged = ClassMoments(self.count, self.mean, self.radius).merge(batch)
        self.count, self.mean, self.radius = merged

    def compute(self) -> ClassManifoldsSummary:
        """Compute counts, radii and distances of all samples so far, of all processes.

        Returns:
            :class:`marginops.metrics.ClassManifoldsSummary`.
        """
        count, mean, radius = self.count, self.mean, self.radius
        if count.dim() == 2:  # torchmetrics stacks the states of all processes
            ranks = map(ClassMoments, count, mean, radius)
            count, mean, radius = functools.reduce(ClassMoments.merge, ranks)
        # Without a matrix product, which would cancel where means are close.
        distance = torch.cdist(mean, mean, compute_mode="donot_use_mm_for_euclid_dist")
        return ClassManifoldsSummary(count, radius, distance)

    def plot(
        self,
        val: ClassManifoldsSummary | Sequence[ClassManifoldsSummary] | None = None,
        ax: Any = None,
    ) -> tuple[Any, Any]:
        """Plot the radius of every class.

        Args:
            val: One or several results of ``compute()`` or ``forward()``, by default that of
                ``compute()``. Several are drawn as lines over the steps.
            ax: Axes of matplotlib to draw into. By default the method makes new axes.

        Returns:
            The figure and the axes.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError, ValueError: ``val`` holds anything else, or nothing.
        """
        ax = shared.new_axes(ax)
        series = shared.as_series(self.compute() if val is None else val, ClassManifoldsSummary)
        if len(series) == 1:
            shared.plot_values(ax, _by_class(series[0]))
            ax.set(xlabel="class")
        else:
            shared.plot_steps(ax, [_by_class(summary) for summary in series], "class")
        ax.set(ylabel="radius")
        return ax.get_figure(), ax

    def _entries(self) -> list[str]:
        return [*ClassManifoldsSummary._fields, "samples", "mean_radius", "mean_distance"]

    def _merged(self, earlier: State, later: State) -> State:
        first, second = (
            ClassMoments(*(state[name] for name in self.own_states)) for state in (earlier, later)
        )
        return first.merge(second)._asdict()

    def _value_fault(self, state: Mapping[str, Any]) -> str | None:
        count, mean, radius = (state[name] for name in self.own_states)
        if (count < 0).any():
            return f"expected count >= 0, got {count.min().item()}"
        empty = count == 0
        if not (mean[empty].isnan().all() and radius[empty].isnan().all()):
            return "expected NaN as mean and radius of classes without samples, got numbers"
        if (radius < 0).any():
            return f"expected radius >= 0, got {radius[radius < 0][0].item()}"
        if (mean.isnan().any(1) != radius.isnan()).any():
            return "expected a radius NaN where the mean has a NaN and nowhere else, got others"
        length = torch.linalg.vector_norm(mean, dim=1)
        if self.normalize and ((radius > _ON_SPHERE).any() or (length > _ON_SPHERE).any()):
            return "expected radius and length of the mean <= 1 with normalize=True, got more"
        return None


def _by_class(summary: ClassManifoldsSummary) -> dict[str, Tensor]:
    return {str(index): radius for index, radius in enumerate(summary.radius.unbind())}
