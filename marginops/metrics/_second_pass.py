"""The second pass over the samples: NC1 and NC4 from one matrix product."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._nearest import decide, differs_exactly
from ._simplex import ratio_along, singular_directions

# Means of these lengths lose nothing in float32: their squares neither over- nor underflow.
_SMALLEST, _LARGEST = 1e-15, 1e15


class _Form(NamedTuple):
    """The class means in the dtype of the product, with K = min(C, D).

    Attributes:
        mean: ``[C, D]``.
        rest: ``[C, D]``, what the rounding of ``mean`` has left out; None in float64.
        directions: ``[K, D]``, the right singular vectors of the centred means.
        twice: ``[C, K]``, twice the coordinates of the centred means along them.
        pairs: ``[C, C]``, the squared distances between the means.
        per_length: 0-d, the error of an order for each unit of length of a deviation.
        fixed: 0-d, the error of an order that does not depend on this length.
    """

    mean: Tensor
    rest: Tensor | None
    directions: Tensor
    twice: Tensor
    pairs: Tensor
    per_length: Tensor
    fixed: Tensor


class SecondPass:
    r"""Compares samples with class means.

    With :math:`x = h - \mu_y`, the centred means :math:`M = U S V` (singular values), and
    :math:`p = V x`, the sum over the samples of :math:`\lVert S^{-1} p \rVert_2^2` leads to NC1,
    and the squared distances to the means have the order of

    .. math:: q_c = \lVert \mu_c - \mu_y \rVert_2^2 - 2 p \cdot (U S)_c.

    So both follow from p, which takes one product [N, D] x [D, K] with K = min(C, D). The product
    has the dtype of the features, but float32 for shorter ones. Nothing cancels: x is a difference
    of the features and of means in float64, of which float32 holds two parts.

    The means whose order is not certain in float32 are compared in float64, and those whose order
    is not certain there by distances as in :func:`marginops.metrics._nearest.differs_exactly`. Let
    u be the unit roundoff of the product, :math:`r = \max_c \lVert M_c \rVert_2`,
    :math:`m = \max_c \lVert \mu_c \rVert_2`, and :math:`\rho` the largest row of M - U S V. Sums of
    n products have a relative error of at most n u of the sum of their magnitudes. Each component
    of p has an error below :math:`(D + 4) u \lVert x \rVert_2`, and the sum of its products with
    :math:`|U S|_c` one of :math:`\sqrt{K}` times that. So rounding changes :math:`q_c` by less than

    .. math::
        2 u r \lVert x \rVert_2 (\sqrt{K} (D + 4) + K + 3) + 4 (D + K + 8) u r^2
        + 2 \rho \lVert x \rVert_2 + 2 u^2 m r.

    A comparison of two classes is safe where they differ by twice as much, and by the error of the
    exact distances. The bound in the code has three times as much.

    Args:
        centers: ``[C, D]`` float64, the class means. Without a finite mean of every class all
            results are NaN.
    """

    def __init__(self, centers: Tensor) -> None:
        self.centers = centers
        shifted = centers - centers.mean(0)
        left, self._singular, directions, self._kept = singular_directions(shifted)
        coordinates = left * self._singular
        self._forms = {torch.float64: self._form(torch.float64, shifted, coordinates, directions)}
        self._radius = torch.linalg.vector_norm(shifted, dim=1).max()
        if self._radius > _SMALLEST and centers.abs().max() < _LARGEST:
            form = self._form(torch.float32, shifted, coordinates, directions)
            self._forms[torch.float32] = form

    def compare(self, input: Tensor, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Compare samples with all means.

        Args:
            input: ``[N, D]``.
            logits: ``[N, C]``.
            label: ``[N]`` int64, the classes of the samples.

        Returns:
            As 0-d float64: the sum of the samples' terms of NC1, and the number of samples whose
            largest logit does not belong to the nearest mean.
        """
        # On the CPU one part of a large batch fits into the cache.
        columns = max(self.centers.shape)
        size = max(1, len(input)) if input.is_cuda else min(2048, max(64, 2**18 // columns))
        along = self._singular.new_zeros(self._singular.shape)
        differing = along.new_zeros(())
        for part in zip(input.split(size), logits.split(size), label.split(size), strict=True):
            squares, differs = self._compare_part(*part)
            along += squares
            differing += differs.sum()
        return ratio_along(along, self._singular, self._kept), differing

    def _compare_part(self, input: Tensor, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        if input.dtype != torch.float64 and torch.float32 in self._forms:
            squares, differs, unsure = self._multiply(torch.float32, input, logits, label)
            if squares.isfinite().all():
                if len(unsure) > 0:
                    some = (values[unsure] for values in (input, logits, label))
                    differs[unsure] = self._compare_in_double(*some)[1]
                return squares, differs
        return self._compare_in_double(input, logits, label)

    def _compare_in_double(
        self, input: Tensor, logits: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        squares, differs, unsure = self._multiply(torch.float64, input, logits, label)
        if len(unsure) > 0:
            rows = input[unsure].double()
            differs[unsure] = differs_exactly(rows, logits[unsure], self.centers)
        return squares, differs

    def _multiply(
        self, dtype: torch.dtype, input: Tensor, logits: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of squares along the directions, the decisions, and which are not certain."""
        form = self._forms[dtype]
        deviation = form.mean.index_select(0, label).sub_(input)  # with the opposite sign
        if form.rest is not None:
            deviation += form.rest.index_select(0, label)
        along = deviation @ form.directions.T
        order = form.pairs.index_select(0, label).addmm_(along, form.twice.T)
        length = torch.linalg.vector_norm(deviation, dim=1, keepdim=True).double()
        limits = torch.finfo(torch.float64)
        exact = limits.eps * (length + 2 * self._radius).square() + limits.tiny
        bound = 3 * (form.per_length * length + form.fixed) + 4 * (input.shape[1] + 8) * exact
        differs, unsure = decide(order, logits, bound)
        return along.double().square_().sum(0), differs, unsure

    def _form(
        self, dtype: torch.dtype, shifted: Tensor, coordinates: Tensor, directions: Tensor
    ) -> _Form:
        centers = self.centers
        mean = centers.to(dtype)
        rest = None if dtype == torch.float64 else (centers - mean).to(dtype)
        exact = "donot_use_mm_for_euclid_dist"
        pairs = torch.cdist(centers, centers, compute_mode=exact).square()
        count, columns = len(directions), centers.shape[1]
        root = math.sqrt(count)
        radius = torch.linalg.vector_norm(shifted, dim=1).max()
        unit, smallest = (torch.finfo(kind).eps / 2 for kind in (dtype, torch.float64))
        residual = torch.linalg.vector_norm(shifted - coordinates @ directions, dim=1).max()
        residual = residual + (count + 2) * root * smallest * radius
        fixed = 4 * (columns + count + 8) * unit * radius.square()
        if rest is not None:
            fixed = fixed + 2 * unit**2 * radius * torch.linalg.vector_norm(centers, dim=1).max()
        return _Form(
            mean,
            rest,
            directions.to(dtype),
            (2 * coordinates).to(dtype),
            pairs.to(dtype),
            2 * unit * radius * (root * (columns + 4) + count + 3) + 2 * residual,
            fixed,
        )
