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
# In this range, a sum of a billion squares of entries neither underflows nor overflows in float32.
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

    The product runs over the linear layers and (transposed) convolutions of the model. A layer
    counts once for each time that the model calls it.

    Banburski et al. (2021) compare networks by margins divided by this product, with the Frobenius
    norm: ``classification_margin(..., log_norm=...)``. If the model is a chain of positively
    homogeneous layers without biases, these margins do not change when a layer is scaled.

    Batch norms count with their values in evaluation, even if the model is in training mode. There
    are three ways to count them, which agree for models without normalisations:

    ============ ===============================================================================
    ``"fold"``   each batch norm multiplies the rows of the layer directly before it by
                 :math:`\gamma / \sqrt{\mathrm{var} + \varepsilon}`
    ``"last"``   only layers after the last normalisation count, often only the last layer, because
                 the scale of layers before a normalisation has no effect; normalisations are batch
                 norms, ``torch.nn.LayerNorm`` and the like
    ``"affine"`` layers count without change, and each batch norm as the diagonal matrix of its
                 :math:`\gamma`: its Frobenius norm is :math:`\lVert \gamma \rVert_2`, its spectral
                 norm :math:`\max |\gamma|`; for a batch norm without weight :math:`\gamma` is 1
    ============ ===============================================================================

    Biases do not count. Some modules and functions do not keep the scale of their input, for
    example ``torch.nn.Tanh``, ``torch.nn.LayerNorm`` and ``gelu``. A ``UserWarning`` names them,
    and their parameters do not count. The function does not check arithmetic in the model's own
    code, such as ``x * x`` or ``x + 1``.

    A layer is a module that computes as the class of PyTorch does, with a weight of its own. All
    other modules with parameters are refused: adapters, quantised layers, and layers with a
    ``forward`` of their own. So is a sum of layers with the same input and no activation between,
    because these act as one matrix. Merge adapters first, and measure a model before it is
    quantised.

    Args:
        model: A model with weights in float32, float64, bfloat16 or float16, on one device. Each
            weight is an ordinary tensor: gather a sharded model first, whose weights are DTensors.
            The function does not change it, nor its training mode and buffers. Weights of
            ``torch.nn.utils.parametrizations`` have their values in evaluation. For a wrapper of
            ``torch.compile`` or of data parallelism, the wrapped model counts.
        norm: ``"frobenius"`` or ``"spectral"``, the largest singular value.
        batch_norm: ``"fold"``, ``"last"`` or ``"affine"``, see above.
        conv: The matrix of a convolution. With ``"flattened"`` it is the weight as
            ``[out, in * kernel]``, block-diagonal with groups. With ``"operator"`` it is the
            matrix that maps the whole input to the whole output.
        example_input: An input of the model, or a tuple of several. The function runs the model on
            it in two cases: with ``conv="operator"``, to learn the input sizes of the
            convolutions; and if ``torch.fx`` cannot trace the model, to count the calls of layers.
        tolerance: The tolerance of the spectral norm. Iterations end when
            :math:`\lVert A^T A v - \sigma^2 v \rVert \le \mathrm{tolerance} \cdot \sigma^2`, so
            the relative error of the norm is about half the tolerance. Small matrices are solved
            exactly, and so are convolutions with circular padding whose strides divide the size of
            their input.

    Returns:
        A 0-d tensor on the device of the weights, float64 if a weight is float64, else float32. It
        is ``-inf`` if all elements of a weight are 0. NaN and infinities in weights propagate. No
        norm and no product overflows or underflows.

    Raises:
        TypeError, ValueError: An argument is wrong. The model has no layer, a module with
            parameters for which no norm is defined, such as ``torch.nn.Embedding``, a matrix
            outside its layers, or a weight that is sharded, quantised or without values. With
            ``"fold"``, ``torch.fx`` cannot trace the model, or a batch norm does not directly
            follow a layer (dropout may be between them), or the output of that layer has another
            use.
        RuntimeError: The spectral norm did not converge to ``tolerance``.

    The logarithm is differentiable in the weights and in :math:`\gamma` of batch norms. For the
    spectral norm it is differentiable once, and the singular vectors are constants. The result is
    deterministic.

    The first call for a model traces a copy of it. Later calls only check that the modules are the
    same. For the Frobenius norm the function reads each weight once and needs O(outputs) memory.
    For the spectral norm it needs the weights in float64 and up to 256 vectors.

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
    """Check that ``tolerance`` is a float between 0 and 1."""
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a float between 0 and 1, got {tolerance!r}")


def log_frobenius_norms(factors: list[Factor], dtype: torch.dtype) -> Tensor:
    """``[factors]`` in float64. The function reads each weight once."""
    matrices = [_rows(factor, dtype) for factor in factors]
    # One sum per row is faster than to scale the rows first, and more exact than one sum of all.
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
    """0-d in float64, for a matrix with rows times ``scale``. Squares may exceed the dtype."""
    peak = _divisor(matrix.detach().abs().amax(1))
    norms = torch.linalg.vector_norm(matrix / peak.unsqueeze(1), dim=1).double()
    weights = peak.double() if scale is None else peak.double() * scale
    peak = _divisor((norms * weights).detach().abs().amax())
    return torch.linalg.vector_norm(norms * (weights / peak)).log() + peak.log()


def _divisor(peak: Tensor) -> Tensor:
    """``peak``, or 1 where division by it would make NaN: where it is 0, infinite or NaN."""
    return torch.where((peak > 0) & peak.isfinite(), peak, 1)


def _rows(factor: Factor, dtype: torch.dtype) -> Tensor:
    """The rows of a matrix with the Frobenius norm of the factor.

    For an operator, each tap of the kernel is multiplied by the square root of the number of
    places where it meets the input.
    """
    weight = factor.weight.to(dtype)
    if factor.is_operator:
        for axis, meets in enumerate(convolution.reach(factor)):
            shape = [1] * weight.dim()
            shape[2 + axis] = -1
            weight = weight * meets.sum(1).double().sqrt().to(weight).view(shape)
    return kinds.rows(factor.module, weight)


def _scales(factors: list[Factor]) -> list[Tensor | None]:
    """The scale of the rows of each factor; None for a factor without a folded batch norm.

    All scales are computed together, with few operations.
    """
    folded = [factor.batch_norm for factor in factors if factor.batch_norm is not None]
    if not folded:
        return [None] * len(factors)
    parts = iter(fold_scale(folded).split([norm.num_features for norm in folded]))
    return [None if factor.batch_norm is None else next(parts) for factor in factors]


def log_spectral_norms(factors: list[Factor], dtype: torch.dtype, tolerance: float) -> Tensor:
    """``[factors]`` in float64."""
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
            exact = blocks.to(dtype) if is_quick else blocks.double()
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
    # The vector is a constant. So the gradient of this is that of the norm, but the second
    # derivative is not.
    return torch.linalg.vector_norm(image).double().log() + peak.double().log()


class _FirstOrder(torch.autograd.Function):
    """The identity. Its gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
