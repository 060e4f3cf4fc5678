"""How far the last layer's features and weights have collapsed to one simplex."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ..ops.moments import class_moments
from . import _shared as shared


class NeuralCollapseSummary(NamedTuple):
    """0-d tensors, each 0 at full collapse; see :class:`NeuralCollapse`."""

    nc1: Tensor
    nc2_norm_means: Tensor
    nc2_angle_means: Tensor
    nc2_norm_weight: Tensor
    nc2_angle_weight: Tensor
    nc3: Tensor
    nc4: Tensor


class _Scatter(NamedTuple):
    """Samples and mean of every class, 0 without samples, and the scatter within the classes.

    Shapes ``[C]`` int64, ``[C, D]`` and ``[D, D]``.
    """

    samples: Tensor
    mean: Tensor
    within: Tensor

    def merge(self, other: "_Scatter") -> "_Scatter":
        """Of the samples of both (Chan, Golub, LeVeque, 1979)."""
        count = self.samples + other.samples
        share = (other.samples.double() / count.clamp(min=1)).unsqueeze(1)
        step = other.mean - self.mean
        between = (self.samples.unsqueeze(1) * share * step).T @ step
        return _Scatter(count, self.mean + share * step, self.within + other.within + between)


def _batch_scatter(input: Tensor, target: Tensor, num_classes: int, ignore_index: int) -> _Scatter:
    input = input.detach().double()
    count, mean, _ = class_moments(input, target, num_classes, ignore_index=ignore_index)
    mean = torch.where((count == 0).unsqueeze(1), 0, mean)
    ignored = target == ignore_index
    deviation = input - mean[torch.where(ignored, 0, target)]
    deviation = torch.where(ignored.unsqueeze(1), 0, deviation)
    return _Scatter(count, mean, deviation.T @ deviation)


class NeuralCollapse(shared.FixedDtypeMetric):
    r"""The four signs of neural collapse, each 0 when it is complete.

    With :math:`\mu_c` the mean feature of class c, :math:`\mu` the mean of the class means, M the
    matrix of the rows :math:`M_c = \mu_c - \mu`, :math:`S_B = M^T M / C`, :math:`S_W` the mean of
    :math:`(h - \mu_y)(h - \mu_y)^T` over all samples and W the weight of the last layer:

    ==================== ==========================================================================
    ``nc1``              :math:`\mathrm{tr}(S_W S_B^+) / C`: variability within the classes
    ``nc2_norm_means``   standard deviation over mean (population) of :math:`\lVert M_c \rVert_2`
    ``nc2_angle_means``  mean of :math:`|\cos(M_c, M_{c'}) + 1/(C-1)|` over :math:`c \ne c'`
    ``nc2_norm_weight``  the same as ``nc2_norm_means`` of the rows of W
    ``nc2_angle_weight`` the same as ``nc2_angle_means`` of the rows of W
    ``nc3``              :math:`\lVert W/\lVert W\rVert_F - M/\lVert M\rVert_F \rVert_F^2`
    ``nc4``              share of samples whose largest logit is not that of the nearest class mean
    ==================== ==========================================================================

    The pseudo-inverse :math:`S_B^+` is of rank C - 1, or D if that is less, and comes from that
    many singular values of M. Where class means depend on each other some of these are zero to
    rounding (at most :math:`2 \cdot 10^{-16} \max(C, D)` of the largest) and left out; where all
    means are equal NC1 is NaN. From Papyan, Han, Donoho (2020).

    Everything but NC4 comes from one pass over the data with :meth:`update`. NC4 needs the class
    means first, so it takes a second pass with :meth:`update_nearest`.

    Args:
        num_classes: C >= 2.
        num_features: D >= 1.
        ignore_index: Samples with this target are left out.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: A number has the wrong type or is too small.

    Results are float64. While a class has no samples, all are NaN but those of the weight; without
    a weight ``nc2_norm_weight``, ``nc2_angle_weight`` and ``nc3`` are NaN; without the second pass
    ``nc4`` is, as it always is in the value of a batch that ``forward`` returns.

    Arithmetic is in float64; a batch costs a product [D, N] x [N, D]. The state takes D (D + 3 C)
    numbers, whatever the number of samples, and is part of ``state_dict``.

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
    full_state_update = True

    count: Tensor
    mean: Tensor
    within: Tensor
    weight: Tensor
    has_weight: Tensor
    centers: Tensor
    has_centers: Tensor
    compared: Tensor
    differing: Tensor

    def __init__(
        self, num_classes: int, num_features: int, *, ignore_index: int = -100, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        checks.check_int("num_classes", num_classes, 2)
        checks.check_int("num_features", num_features, 1)
        self.num_classes, self.num_features = num_classes, num_features
        self.ignore_index = ignore_index
        zeros = torch.zeros(num_classes, num_features, dtype=torch.float64)
        no = torch.tensor(False)
        # Of the first pass; what has no reduction is stacked over processes.
        self.add_state("count", torch.zeros(num_classes, dtype=torch.int64), persistent=True)
        self.add_state("mean", zeros, persistent=True)
        self.add_state("within", zeros.new_zeros(num_features, num_features), persistent=True)
        self.add_state("weight", zeros * torch.nan, persistent=True)
        self.add_state("has_weight", no, persistent=True)
        # Of the second pass.
        self.add_state("centers", zeros * torch.nan, persistent=True)
        self.add_state("has_centers", no.clone(), persistent=True)
        self.add_state("compared", torch.tensor(0), dist_reduce_fx="sum", persistent=True)
        self.add_state("differing", zeros.new_zeros(()), dist_reduce_fx="sum", persistent=True)

    def update(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add samples, and keep the weight of the last layer.

        Args:
            input: ``[N, D]``, the input of the last layer, float32, float64, bfloat16 or float16.
            target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
            weight: ``[C, D]``, any of these dtypes; replaces the one of earlier calls. Once in a
                pass is enough.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
            RuntimeError: A target is outside [0, C) (CPU); on CUDA a device-side assertion.
        """
        shared.check_columns("input", input, "N", self.num_features, self.count.device)
        if weight is not None:
            self._check_weight(weight)
        batch = _batch_scatter(input, target, self.num_classes, self.ignore_index)
        merged = _Scatter(self.count, self.mean, self.within).merge(batch)
        self.count, self.mean, self.within = merged
        self.has_centers = torch.zeros_like(self.has_centers)
        if weight is not None:
            self.weight = weight.detach().double()
            self.has_weight = torch.ones_like(self.has_weight)

    def update_nearest(self, input: Tensor, logits: Tensor) -> None:
        """Count samples whose largest logit is not that of the nearest class mean.

        The means are those of all samples before the first call, of all processes: in that call
        they gather them, so each has to make it, with ``[0, D]`` and ``[0, C]`` if it has no
        samples. A later :meth:`update` moves the means and starts this pass anew. Waits for the
        device.

        Args:
            input: ``[N, D]`` as in :meth:`update`; rows that were ignored there have to be left
                out by the caller.
            logits: ``[N, C]``. Among equal logits or distances the lowest class counts.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        """
        shared.check_columns("input", input, "N", self.num_features, self.count.device)
        shared.check_columns("logits", logits, "N", self.num_classes, self.count.device)
        if len(logits) != len(input):
            raise ValueError(
                f"logits: expected {len(input)} rows for input {list(input.shape)}, "
                f"got shape {list(logits.shape)}"
            )
        if not self.has_centers:
            self._fix_centers()
        with torch.no_grad():
            # Not by way of a product, which cancels where means are close.
            exact = "donot_use_mm_for_euclid_dist"
            distance, nearest = torch.cdist(input.double(), self.centers, compute_mode=exact).min(1)
            largest, predicted = logits.max(1)
            # With a NaN, or no distance, or no mean, there is nothing to compare.
            comparable = distance.isfinite() & ~largest.isnan()
            differs = torch.where(comparable, (predicted != nearest).double(), torch.nan)
        self.compared = self.compared + len(input)
        self.differing = self.differing + differs.sum()
        self._computed = None

    def compute(self) -> NeuralCollapseSummary:
        """The summary of all samples so far, of all processes.

        Returns:
            :class:`NeuralCollapseSummary`.
        """
        scatter, weight = self._scatter(), self.weight
        if weight.dim() == 3:  # of all processes, of which some may have none
            weight = weight[self.has_weight.long().argmax()]
        means = _means(scatter)
        means = means - means.mean(0)
        nc3 = weight / torch.linalg.matrix_norm(weight) - means / torch.linalg.matrix_norm(means)
        return NeuralCollapseSummary(
            _within_over_between(scatter, means),
            *_distance_to_simplex(means),
            *_distance_to_simplex(weight),
            nc3.square().sum(),
            torch.where(self.has_centers.all(), self.differing / self.compared, torch.nan),
        )

    def _check_weight(self, weight: Any) -> None:
        shared.check_columns("weight", weight, "C", self.num_features, self.count.device)
        if len(weight) != self.num_classes:
            raise ValueError(
                f"weight: expected shape {[self.num_classes, self.num_features]}, "
                f"got {list(weight.shape)}"
            )

    def _scatter(self) -> _Scatter:
        """Of all processes, whose states torchmetrics stacks when it has gathered them."""
        scatter = _Scatter(self.count, self.mean, self.within)
        if self.count.dim() == 1:
            return scatter
        return functools.reduce(_Scatter.merge, map(_Scatter, *scatter))

    def _fix_centers(self) -> None:
        """Keep the means of all processes, and start counting."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            centers = _means(self._scatter())
        self.centers = centers
        self.has_centers = torch.ones_like(self.has_centers)
        self.compared = torch.zeros_like(self.compared)
        self.differing = torch.zeros_like(self.differing)


def _means(scatter: _Scatter) -> Tensor:
    return torch.where((scatter.samples == 0).unsqueeze(1), torch.nan, scatter.mean)


def _within_over_between(scatter: _Scatter, means: Tensor) -> Tensor:
    """tr(S_W pinv(S_B)) / C, with S_B = M^T M / C = V S^2 V^T / C."""
    # A decomposition of NaN raises; where there is one, decompose zeros instead.
    finite = means.isfinite().all()
    _, singular, directions = torch.linalg.svd(torch.where(finite, means, 0), full_matrices=False)
    rank = min(len(means) - 1, means.shape[1])
    singular, directions = singular[:rank], directions[:rank]
    rounding = torch.finfo(means.dtype).eps * max(means.shape)
    kept = singular > rounding * singular[0]
    variance = ((directions @ scatter.within) * directions).sum(1) / scatter.samples.sum()
    ratio = torch.where(kept, variance / singular.square(), 0).sum()
    return torch.where(kept.any() & finite, ratio, torch.nan)


def _distance_to_simplex(rows: Tensor) -> tuple[Tensor, Tensor]:
    """How far from equal norms, and from the angles of a simplex."""
    classes = len(rows)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norm
    deviation = (unit @ unit.T + 1 / (classes - 1)).abs().fill_diagonal_(0)
    return norm.std(correction=0) / norm.mean(), deviation.sum() / (classes * (classes - 1))
