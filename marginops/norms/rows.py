"""Norms that follow from the 2-norms of the rows of a matrix. No square leaves its range."""

import math

import torch
from torch import Tensor

from . import convolution
from . import layers as kinds
from .factors import Factor, fold_scale, scaled_weight

# In this range, a sum of a billion squares of entries neither underflows nor overflows in float32.
_SAFE = 1e-10, 1e18


def log_frobenius_norm(factor: Factor, dtype: torch.dtype) -> Tensor:
    """0-d float64. The function reads the weight once if no row is 0 or far from 1."""
    if factor.is_operator:
        return _log_norm(convolution.row_norms(factor, scaled_weight(factor, torch.float64)))
    norms = _row_norms(kinds.rows(factor.module, factor.weight.to(dtype)))
    # To scale the norms of the rows is faster than to scale the rows.
    if factor.batch_norm is not None:
        norms = norms * fold_scale(factor.batch_norm)
    return _log_norm(norms)


def log_two_one_norm(factor: Factor, origin: Factor | None) -> Tensor:
    """The logarithm of ``||A^T - M^T||_{2, 1}``, the sum of the 2-norms of the rows, in float64."""
    difference = scaled_weight(factor, torch.float64)
    if origin is not None:
        difference = difference - scaled_weight(origin, torch.float64)
    if factor.is_operator:
        return _log_norm(convolution.row_norms(factor, difference), order=1)
    return _log_norm(_row_norms(kinds.rows(factor.module, difference)), order=1)


def log_size(input: Tensor) -> Tensor:
    """The logarithm of the Frobenius norm of the data divided by the number of samples."""
    exact = input.to(torch.promote_types(input.dtype, torch.float32))
    return _log_norm(_row_norms(exact.reshape(len(input), -1))) - math.log(len(input))


def _row_norms(matrix: Tensor) -> Tensor:
    """``[rows]`` in float64."""
    # One sum per row is more exact than one sum of all.
    norms = torch.linalg.vector_norm(matrix, dim=1)
    lowest, highest = torch.stack(torch.aminmax(norms.detach())).tolist()
    if lowest >= _SAFE[0] and highest <= _SAFE[1]:
        return norms.double()
    peak = _divisor(torch.linalg.vector_norm(matrix.detach(), math.inf, dim=1))
    return torch.linalg.vector_norm(matrix / peak.unsqueeze(1), dim=1).double() * peak.double()


def _log_norm(norms: Tensor, order: int = 2) -> Tensor:
    peak = _divisor(norms.detach().abs().amax())
    norm = torch.linalg.vector_norm(norms / peak, order)
    # The logarithm of 0 has the gradient 0. A layer that equals its reference then has none.
    is_zero = norm == 0
    return torch.where(is_zero, -math.inf, torch.where(is_zero, 1, norm).log()) + peak.log()


def _divisor(peak: Tensor) -> Tensor:
    """``peak``, or 1 where division by it would make NaN: where it is 0, infinite or NaN."""
    return torch.where((peak > 0) & peak.isfinite(), peak, 1)
