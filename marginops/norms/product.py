"""The product of the norms of a model's layers, as a logarithm."""

from typing import Literal

import torch
from torch import Tensor, nn

from .. import _checks as checks
from .factors import BatchNorm, Convolution, factors_of, result_dtype
from .rows import log_frobenius_norm
from .spectral import log_spectral_norm

Norm = Literal["frobenius", "spectral"]


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
            the relative error of the norm is at most about half the tolerance. Matrices with a
            side of at most 64 are solved exactly; with ``conv="operator"`` only the size of the
            input of a convolution counts.

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
        ImportError: SciPy is missing, which finds the spectral norm of larger matrices.

    The logarithm is differentiable in the weights and in :math:`\gamma` of batch norms. For the
    spectral norm it is differentiable once, and the singular vectors are constants. The result is
    deterministic.

    Every call traces a copy of the model with ``torch.fx``, in about 10 ms for a ResNet-18. For the
    Frobenius norm the function reads each weight once and needs O(outputs) memory. For the spectral
    norm it needs the largest weight in float64 and 20 vectors.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        >>> _ = torch.nn.init.eye_(model[0].weight)
        >>> marginops.log_norm_product(model).exp()
        tensor(1.4142, grad_fn=<ExpBackward0>)
        >>> marginops.log_norm_product(model, norm="spectral").exp()
        tensor(1., grad_fn=<ExpBackward0>)
    """
    checks.check_choice("norm", norm, ("frobenius", "spectral"))
    if not isinstance(tolerance, float) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a float between 0 and 1, got {tolerance!r}")
    factors = factors_of(model, batch_norm, conv, example_input, stacklevel=2)
    dtype = result_dtype(factors)
    with torch.autocast(factors[0].weight.device.type, enabled=False):
        if norm == "spectral":
            norms = [log_spectral_norm(factor, dtype, tolerance) for factor in factors]
        else:
            norms = [log_frobenius_norm(factor, dtype) for factor in factors]
        return torch.stack(norms).sum().to(dtype)
