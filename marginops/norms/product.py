"""The product of the norms of a model's layers, as a logarithm."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import _checks as checks
from . import convolution
from . import layers as kinds
from .factors import (
    BatchNorm,
    Convolution,
    Factor,
    factors_of,
    fold_scale,
    result_dtype,
    scaled_weight,
)
from .spectral import GRAM, leading_right_vector

Norm = Literal["frobenius", "spectral"]
# Between these a norm's squares neither vanish nor overflow in float32, a billion of them.
_SAFE = 1e-10, 1e18


def log_norm_product(
    model: nn.Module,
    *,
    norm: Norm = "frobenius",
    batch_norm: BatchNorm = "fold",
    conv: Convolution = "flattened",
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    tolerance: float = 1e-6,
) -> Tensor:
    r"""Logarithm of the product of the norms of a model's layers.

    .. math:: \log \prod_k \lVert W_k \rVert = \sum_k \log \lVert W_k \rVert

    over the linear layers and (transposed) convolutions of the model, once for each time that the
    model calls them. Margins divided by this product, ``classification_margin(..., log_norm=...)``,
    do not change when a layer of a positively homogeneous chain without biases is scaled, so they
    compare networks: Banburski et al. (2021), with the Frobenius norm.

    Batch norms count as they are in evaluation, whatever the mode of the model, in one of three
    ways, which differ only for models with batch norms:

    ============ ===============================================================================
    ``"fold"``   each multiplies the rows of the layer directly before it by
                 :math:`\gamma / \sqrt{\mathrm{var} + \varepsilon}`
    ``"last"``   only layers after the last normalisation count, mostly the last layer alone: those
                 before are free of scale; ``torch.nn.LayerNorm`` is a normalisation, too
    ``"affine"`` layers count as they are, and each batch norm as the diagonal matrix of its
                 :math:`\gamma`: by :math:`\lVert \gamma \rVert_2` for the Frobenius norm, by
                 :math:`\max |\gamma|` for the spectral; without one :math:`\gamma` is 1
    ============ ===============================================================================

    Biases do not count. What is known not to keep the scale of its input, as ``torch.nn.Tanh``,
    ``torch.nn.LayerNorm``, ``gelu``, is named in a ``UserWarning``, and what parameters it has
    do not count. Arithmetic in a forward, as ``x * x`` or ``x + 1``, is not judged.

    Args:
        model: Its weights in float32, float64, bfloat16 or float16, on one device. Left as it is,
            training mode and buffers too. Weights of ``torch.nn.utils.parametrizations`` count as
            in evaluation. What ``torch.compile`` or data parallelism wraps counts as by itself.
        norm: ``"frobenius"`` or ``"spectral"``, the largest singular value.
        batch_norm: ``"fold"``, ``"last"`` or ``"affine"``, see above.
        conv: A convolution's matrix: ``"flattened"``, ``[out, in * kernel]`` (block-diagonal with
            groups), or ``"operator"``, that which maps the whole input to the whole output.
        example_input: The input of the model, or a tuple of several. The model is run on it if
            ``conv="operator"``, for the sizes that convolutions get, and to count the calls of
            layers if ``torch.fx`` cannot trace the model.
        tolerance: For the spectral norm. Iterations end when
            :math:`\lVert A^T A v - \sigma^2 v \rVert \le \mathrm{tolerance} \cdot \sigma^2`, so
            that the norm is as good as half of that. Small matrices, and convolutions with circular
            padding whose strides divide the size of their input, are solved exactly.

    Returns:
        A 0-d tensor on the device of the weights, float64 if a weight is float64, else float32.
        ``-inf`` where a weight is 0; NaN and infinities in weights propagate. No norm and no
        product over- or underflows.

    Raises:
        TypeError, ValueError: An argument is wrong; the model has no layer, or parameters in
            modules of which the norm is not defined, as ``torch.nn.Embedding``; with ``"fold"`` it
            cannot be traced, or a batch norm does not directly follow a layer (at most dropout in
            between) whose output has no other use.
        RuntimeError: The spectral norm did not converge to ``tolerance``.

    Differentiable in weights and batch norms' :math:`\gamma`; for the spectral norm once, with the
    singular vectors as constants. Deterministic. The first call for a model traces a copy of it,
    later ones check that its modules are the same and read each weight once for the Frobenius
    norm. Beside that O(outputs); for the spectral norm the weights in float64, and up to 256
    vectors.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> marginops.log_norm_product(model).exp()
        tensor(1.4142, grad_fn=<ExpBackward0>)
        >>> marginops.log_norm_product(model, norm="spectral").exp()
        tensor(1., grad_fn=<ExpBackward0>)
    """
    checks.check_choice("norm", norm, ("frobenius", "spectral"))
    check_tolerance(tolerance)
    factors = factors_of(model, batch_norm, conv, example_input, stacklevel=2)
    dtype = result_dtype(factors)
    with torch.autocast(factors[0].weight.device.type, enabled=False):
        if norm == "spectral":
            return log_spectral_norms(factors, dtype, tolerance).sum().to(dtype)
        return log_frobenius_norms(factors, dtype).sum().to(dtype)


def check_tolerance(tolerance: Any) -> None:
    """A positive number."""
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a float between 0 and 1, got {tolerance!r}")


def log_frobenius_norms(factors: list[Factor], dtype: torch.dtype) -> Tensor:
    """[factors] in float64, from one reading of each weight."""
    matrices = [_rows(factor, dtype) for factor in factors]
    # A sum for each row: quicker than for rows that are weighted, more exact than one of all.
    norms = torch.cat([torch.linalg.vector_norm(matrix, dim=1) for matrix in matrices]).double()
    outputs = [matrix.shape[0] for matrix in matrices]
    scales = _scales(factors)
    ones = norms.new_ones(max(outputs))
    scale = torch.cat(
        [
            ones[:size] if scale is None else scale
            for size, scale in zip(outputs, scales, strict=True)
        ]
    )
    parts = (norms * scale).split(outputs)
    lowest, highest = torch.stack(torch.aminmax(norms.detach())).tolist()
    if lowest >= _SAFE[0] and highest <= _SAFE[1]:
        return torch.stack(torch._foreach_norm(parts)).log()
    return torch.stack(
        [log_frobenius_norm(matrix, scale) for matrix, scale in zip(matrices, scales, strict=True)]
    )


def log_frobenius_norm(matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """0-d in float64, of a matrix whose squares may not be representable, its rows scaled."""
    peak = _divisor(matrix.detach().abs().amax(1))
    norms = torch.linalg.vector_norm(matrix / peak.unsqueeze(1), dim=1).double()
    weights = peak.double() if scale is None else peak.double() * scale
    peak = _divisor((norms * weights).detach().abs().amax())
    return torch.linalg.vector_norm(norms * (weights / peak)).log() + peak.log()


def _divisor(peak: Tensor) -> Tensor:
    """1 instead of what would make NaN of zeros and infinities."""
    return torch.where((peak > 0) & peak.isfinite(), peak, 1)


def _rows(factor: Factor, dtype: torch.dtype) -> Tensor:
    """The matrix by rows; each tap times the root of how often it meets the input."""
    weight = factor.weight.to(dtype)
    if factor.is_operator:
        met = convolution.reach(factor)
        for axis, times in enumerate(met):
            shape = [1] * weight.dim()
            shape[2 + axis] = -1
            weight = weight * times.sum(1).double().sqrt().to(weight).view(shape)
    return kinds.rows(factor.module, weight)


def _scales(factors: list[Factor]) -> list[Tensor | None]:
    """For each factor the scale of its rows, all from a few operations."""
    folded = [factor.batch_norm for factor in factors if factor.batch_norm is not None]
    if not folded:
        return [None] * len(factors)
    parts = iter(fold_scale(folded).split([norm.num_features for norm in folded]))
    return [None if factor.batch_norm is None else next(parts) for factor in factors]


def log_spectral_norms(factors: list[Factor], dtype: torch.dtype, tolerance: float) -> Tensor:
    """[factors] in float64."""
    return torch.stack([_log_spectral_norm(factor, dtype, tolerance) for factor in factors])


def _log_spectral_norm(factor: Factor, dtype: torch.dtype, tolerance: float) -> Tensor:
    weight: Tensor = _FirstOrder.apply(scaled_weight(factor, dtype))
    peak = weight.detach().abs().amax()
    if not 0 < peak.item() < math.inf:
        return peak.double().log()
    weight = weight / peak
    if not factor.is_operator:
        blocks = kinds.blocks(factor.module, weight)
        with torch.no_grad():
            is_quick = min(blocks.shape[1:]) > GRAM and tolerance >= 1e-6
            exact = blocks if is_quick else blocks.double()
            block, vector = leading_right_vector(exact, tolerance, factor.name)
        image = blocks[block].to(vector.dtype) @ vector
    elif convolution.is_circulant(factor):
        symbol = convolution.Symbol(factor)
        with torch.no_grad():
            first, block, vector = symbol.right_vector(weight, factor.name)
        image = symbol.at(weight, first)[block] @ vector
    else:
        weight = weight.double()
        with torch.no_grad():
            vector = convolution.right_vector(factor, weight, tolerance)
        image = convolution.convolve(factor, weight, vector)
    # With the vector a constant, this has the gradient of the norm, but not its second one.
    return torch.linalg.vector_norm(image).double().log() + peak.double().log()


class _FirstOrder(torch.autograd.Function):
    """The identity, with a gradient that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
