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
        mean: ``[C, D]``, rounded to the dtype.
        directions: ``[K, D]``, the right singular vectors of the centred means.
        rest: ``[K, C]``, what the rounding has left out of the means, along the directions.
        twice: ``[C, K]``, twice the coordinates of the centred means along the directions.
        pairs: ``[C, C]``, the squared distances between the means.
        lost: 0-d, the largest length of what the rounding has left out.
        bound: 0-d, the coefficients of the bound, a polynomial of degree 2 of the length of a
            deviation, highest first.
    """

    mean: Tensor
    directions: Tensor
    rest: Tensor
    twice: Tensor
    pairs: Tensor
    lost: Tensor
    bound: tuple[Tensor, Tensor, Tensor]


class SecondPass:
    r"""Compares samples with class means.

    With :math:`x = h - \mu_y`, the centred means :math:`M = U S V` (singular values), and
    :math:`p = V x`, the sum over the samples of :math:`\lVert S^{-1} p \rVert_2^2` leads to NC1,
    and the squared distances to the means have the order of

    .. math:: q_c = \lVert \mu_c - \mu_y \rVert_2^2 - 2 (U S)_c \cdot p.

    So both follow from p, which takes one product [K, D] x [D, N] with K = min(C, D). The product
    is in float64 for float64 features, else in float32. Nothing cancels, also in float32: there
    :math:`\mu_y = a_y + b_y`, where :math:`a_y` is the mean rounded to float32, and
    :math:`p = V (h - a_y) - V b_y`, where the second product needs only the classes.

    Samples whose decision is not certain in float32 are compared in float64, and those whose
    decision is not certain there by :func:`marginops.metrics._nearest.differs_exactly`. Let u be
    the unit roundoff of the product, :math:`r = \max_c \lVert M_c \rVert_2`,
    :math:`l = \lVert h - a_y \rVert_2 + \max_c \lVert b_c \rVert_2`, and :math:`\rho` the length of
    the largest row of M - U S V. Sums of n products have a relative error of at most n u of the sum
    of their magnitudes. So each component of p has an error below :math:`(D + 4) u l`, and the sum
    of its products with :math:`|U S|_c` one of :math:`\sqrt{K} r` times that. Rounding changes
    :math:`q_c` by less than

    .. math:: 2 u r l (\sqrt{K} (D + 4) + K + 3) + 2 \rho l + 4 (D + K + 8) u r^2.

    A comparison of two classes is safe where they differ by twice as much, plus the error of the
    exact distances. The bound in the code has three times as much, which covers the rounding of the
    bound itself.

    Args:
        centers: ``[C, D]`` float64, the class means. Without a finite mean of every class all
            results are NaN.
    """

    def __init__(self, centers: Tensor) -> None:
        self.centers = centers
        shifted = centers - centers.mean(0)
        left, self._singular, directions, self._kept = singular_directions(shifted)
        self._radius = torch.linalg.vector_norm(shifted, dim=1).max()
        coordinates = left * self._singular
        dtypes = [torch.float64]
        if self._radius > _SMALLEST and centers.abs().max() < _LARGEST:
            dtypes.append(torch.float32)
        self._forms = {dtype: self._form(dtype, coordinates, directions) for dtype in dtypes}

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
        along = form.directions @ deviation.T
        if dtype != torch.float64:
            along += form.rest.index_select(1, label)
        order = form.pairs.index_select(1, label).addmm_(form.twice, along)
        length = torch.linalg.vector_norm(deviation, dim=1).double() + form.lost
        square, linear, fixed = form.bound
        differs, unsure = decide(order, logits, (length * square + linear) * length + fixed)
        return along.double().square_().sum(1), differs, unsure

    def _form(self, dtype: torch.dtype, coordinates: Tensor, directions: Tensor) -> _Form:
        centers, mean = self.centers, self.centers.to(dtype)
        exact = "donot_use_mm_for_euclid_dist"
        left_out = centers - mean
        return _Form(
            mean,
            directions.to(dtype),
            (directions @ left_out.T).to(dtype),
            (2 * coordinates).to(dtype),
            torch.cdist(centers, centers, compute_mode=exact).square().to(dtype),
            torch.linalg.vector_norm(left_out, dim=1).max(),
            self._bound(dtype, coordinates, directions),
        )

    def _bound(
        self, dtype: torch.dtype, coordinates: Tensor, directions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, columns = directions.shape
        root, radius = math.sqrt(count), self._radius
        limits = torch.finfo(torch.float64)
        unit = torch.finfo(dtype).eps / 2
        residual = self.centers - self.centers.mean(0) - coordinates @ directions
        longest = torch.linalg.vector_norm(residual, dim=1).max()
        longest = longest + (count + 2) * root * limits.eps * radius  # its own rounding
        linear = 2 * unit * radius * (root * (columns + 4) + count + 3) + 2 * longest
        fixed = 4 * (columns + count + 8) * unit * radius.square()
        # The bound of the exact distances, factor (eps (length + 2 radius)^2 + tiny), multiplied
        # out.
        factor = 4 * (columns + 8)
        square = torch.full_like(radius, factor * limits.eps)
        return (
            square,
            3 * linear + 4 * radius * square,
            3 * fixed + 4 * radius.square() * square + factor * limits.tiny,
        )
