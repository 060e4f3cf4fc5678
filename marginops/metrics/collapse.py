"""Neural collapse: how close class means and weight of the last layer are to one simplex."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks
from ..ops.arguments import checked_target
from . import _shared as shared
from ._collapse_state import CollapseState
from ._nearest import differs_from_nearest
from ._scatter import Scatter
from ._simplex import distance_to_simplex, within_over_between
from ._summaries import NeuralCollapseSummary


class NeuralCollapse(CollapseState):
    r"""The four properties of neural collapse, each 0 at full collapse.

    Let :math:`\mu_c` be the mean feature of class c, :math:`\mu` the mean of the class means, M the
    matrix with the rows :math:`M_c = \mu_c - \mu`, :math:`S_B = M^T M / C`, :math:`S_W` the mean
    of :math:`(h - \mu_y)(h - \mu_y)^T` over all samples, and W the weight of the last layer:

    ==================== ==========================================================================
    ``nc1``              :math:`\mathrm{tr}(S_W S_B^+) / C`: variability within the classes
    ``nc2_norm_means``   standard deviation (population) of :math:`\lVert M_c \rVert_2`, divided by
                         their mean
    ``nc2_angle_means``  mean of :math:`|\cos(M_c, M_{c'}) + 1/(C-1)|` over :math:`c \ne c'`
    ``nc2_norm_weight``  the same as ``nc2_norm_means``, for the rows of W
    ``nc2_angle_weight`` the same as ``nc2_angle_means``, for the rows of W
    ``nc3``              :math:`\lVert W/\lVert W\rVert_F - M/\lVert M\rVert_F \rVert_F^2`
    ``nc4``              share of samples for which the class of the largest logit is not the class
                         of the nearest mean
    ==================== ==========================================================================

    The properties are those of Papyan, Han, Donoho (2020).

    The metric computes the pseudo-inverse :math:`S_B^+` from the singular values of M. Its rank is
    C - 1, or D if D is smaller. If class means are linearly dependent, some of these singular
    values are 0 up to rounding, at most :math:`2 \cdot 10^{-16} \max(C, D)` of the largest. These
    do not count. If all means are equal, NC1 is NaN.

    All results but NC4 need one pass over the data, with
    :meth:`marginops.metrics.NeuralCollapse.update`. NC4 needs the class means first. So it takes a
    second pass, with :meth:`marginops.metrics.NeuralCollapse.update_nearest`. With ``two_passes``
    the second pass leads to NC1 as well. Both passes are then faster together, and the state is
    smaller.

    Args:
        num_classes: C >= 2.
        num_features: D >= 1.
        two_passes: Whether NC1 comes from the second pass.
        ignore_index: Samples with this target do not count.
        **kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: A number has the wrong type or is too small.

    Results are float64 and have no unit. As long as a class has no samples, all results are NaN but
    ``nc2_norm_weight`` and ``nc2_angle_weight``. Without a weight these two and ``nc3`` are NaN.
    Without the second pass ``nc4`` is NaN, and with ``two_passes`` also ``nc1``. They are always
    NaN in the value of a batch that ``forward`` returns.

    The metric computes in float64. A batch costs a product [D, N] x [N, D], and one of [N, D] x
    [D, C] in the second pass. With ``two_passes`` it costs only the latter. This product is in
    float32 for features of float32 or shorter. So NC1 has a relative error of about 1e-6 there, and
    NC4 is the same as without ``two_passes``. The state takes D (D + 3 C) numbers for any number of
    samples, 3 C D with ``two_passes``, and is part of ``state_dict``.

    Where states merge, the weight is that of the last one that has a weight. In a window of
    ``torchmetrics.wrappers.Running`` nobody knows which one is the last: if their weights differ,
    the metric has no weight there. After :meth:`marginops.metrics.NeuralCollapse.merge_state` the
    second pass goes on only if both metrics compare with the same means, as the processes of one
    group do, or if one metric is empty. Else it starts from the beginning.

    Example:
        >>> import torch
        >>> from marginops.metrics import NeuralCollapse
        >>> features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        >>> weight = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])
        >>> metric = NeuralCollapse(num_classes=2, num_features=2)
        >>> metric.update(features, torch.tensor([0, 0, 1, 1]), weight)
        >>> metric.update_nearest(features, features @ weight.T)
        >>> summary = metric.compute()
        >>> [round(value.item(), 4) for value in (summary.nc1, summary.nc3, summary.nc4)]
        [0.0, 0.0, 0.0]
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        num_classes: int,
        num_features: int,
        *,
        two_passes: bool = False,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> None:
        checks.check_int("num_classes", num_classes, 2)
        checks.check_int("num_features", num_features, 1)
        if not isinstance(two_passes, bool):
            raise TypeError(f"two_passes: expected a bool, got {type(two_passes).__name__}")
        checks.check_int("ignore_index", ignore_index)
        arguments = {
            "num_classes": num_classes,
            "num_features": num_features,
            "two_passes": two_passes,
            "ignore_index": ignore_index,
        }
        super().__init__(arguments, **kwargs)

    def update(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add samples, and keep the weight of the last layer.

        Args:
            input: ``[N, D]``, the input of the last layer, float32, float64, bfloat16 or float16.
            target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
            weight: ``[C, D]``, any of these dtypes. It replaces the weight of earlier calls, so one
                call per pass is enough to pass it.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
            RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
                assertion.
        """
        shared.check_columns("input", input, "N", self.num_features, self.count.device)
        if weight is not None:
            self._check_weight(weight)
        checks.check_target(target, input, self.ignore_index, "input")
        scatter = Scatter.of(self.metric_state).add(input.detach(), target, self.ignore_index)
        for name, value in scatter.state().items():
            setattr(self, name, value)
        self.has_centers = torch.zeros_like(self.has_centers)
        if weight is not None:
            self.weight = weight.detach().double()
            self.has_weight = torch.ones_like(self.has_weight)

    def update_nearest(self, input: Tensor, logits: Tensor, target: Tensor | None = None) -> None:
        """Count the samples whose largest logit does not belong to the nearest class mean.

        With ``two_passes`` the method also adds the variability within the classes.

        The first call fixes the means of all samples so far, of all processes. In this call the
        processes exchange their means. So every process has to make it. A process without samples
        passes ``[0, D]`` and ``[0, C]``. A later call of
        :meth:`marginops.metrics.NeuralCollapse.update` changes the means, and this pass starts
        from the beginning. The method waits for the device.

        Args:
            input: ``[N, D]``, as in :meth:`marginops.metrics.NeuralCollapse.update`.
            logits: ``[N, C]``. Among equal logits or distances the lowest class counts.
            target: ``[N]`` int64, as in :meth:`marginops.metrics.NeuralCollapse.update`. It is
                needed with ``two_passes``. Else it only tells which samples do not count; without
                it the caller has to leave out the samples with ``ignore_index``.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or
                ``target`` is missing with ``two_passes``.
            RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
                assertion.
        """
        shared.check_columns("input", input, "N", self.num_features, self.count.device)
        shared.check_columns("logits", logits, "N", self.num_classes, self.count.device)
        if len(logits) != len(input):
            raise ValueError(
                f"logits: expected {len(input)} rows for input {list(input.shape)}, "
                f"got shape {list(logits.shape)}"
            )
        if target is not None:
            checks.check_target(target, input, self.ignore_index, "input")
            ignored, target = checked_target(target, self.num_classes, self.ignore_index)
            if ignored.any():
                kept = ~ignored
                input, logits, target = input[kept], logits[kept], target[kept]
        elif self.two_passes:
            raise TypeError(
                "target: expected a tensor [N] with two_passes=True, got NoneType; "
                "pass the targets that update took"
            )
        if not self.has_centers:
            self._fix_centers()
        with torch.no_grad():
            if self.two_passes and target is not None:
                ratio, differing = self._comparison().compare(input, logits, target)
                self.ratio = self.ratio + ratio
            else:
                differing = differs_from_nearest(input, logits, self.centers).sum()
        self.compared = self.compared + len(input)
        self.differing = self.differing + differing
        self._computed = None

    def compute(self) -> NeuralCollapseSummary:
        """Compute the results of all samples so far, of all processes.

        Returns:
            :class:`marginops.metrics.NeuralCollapseSummary`.
        """
        scatter, weight = self._scatter(), self.weight
        if weight.dim() == 3:  # the weights of all processes, some of which may have none
            weight = weight[self.has_weight.long().argmax()]
        means = scatter.means()
        means = means - means.mean(0)
        nc3 = weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)
        nc4 = torch.where(self.has_centers.all(), self.differing / self.compared, torch.nan)
        if self.two_passes:
            nc1 = torch.where(self.has_centers.all(), self.ratio / self.compared, torch.nan)
        else:
            nc1 = within_over_between(scatter, means)
        return NeuralCollapseSummary(
            nc1,
            *distance_to_simplex(means),
            *distance_to_simplex(weight),
            nc3.square().sum(),
            nc4,
        )

    def plot(
        self,
        val: NeuralCollapseSummary | Sequence[NeuralCollapseSummary] | None = None,
        ax: Any = None,
    ) -> tuple[Any, Any]:
        """Plot all properties.

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
        series = shared.as_series(self.compute() if val is None else val, NeuralCollapseSummary)
        if len(series) == 1:
            shared.plot_values(ax, series[0].scalars())
            ax.tick_params("x", rotation=30)
        else:
            shared.plot_steps(ax, [summary.scalars() for summary in series], "property")
        ax.set(ylabel="distance from collapse")
        return ax.get_figure(), ax

    def _entries(self) -> list[str]:
        return list(NeuralCollapseSummary._fields)

    def _check_weight(self, weight: Any) -> None:
        shared.check_columns("weight", weight, "C", self.num_features, self.count.device)
        if len(weight) != self.num_classes:
            raise ValueError(
                f"weight: expected shape {[self.num_classes, self.num_features]}, "
                f"got {list(weight.shape)}"
            )
