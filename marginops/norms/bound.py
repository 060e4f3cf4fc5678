"""Margins divided by the spectral complexity of a model."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..ops.margin import classification_margin
from . import convolution
from . import layers as kinds
from .factors import BatchNorm, Convolution, Factor, factors_of, result_dtype, scaled_weight
from .product import log_frobenius_norm, log_spectral_norms


def spectrally_normalized_margin(
    logits: Tensor,
    target: Tensor,
    model: nn.Module,
    *,
    reference: nn.Module | None = None,
    input: Tensor | None = None,
    batch_norm: BatchNorm = "fold",
    conv: Convolution = "flattened",
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Signed margin of every sample divided by the spectral complexity of the model.

    Let :math:`A_i` be the matrices of the layers, :math:`s_i` their spectral norms and :math:`M_i`
    the matrices of ``reference``:

    .. math:: (f_{n, y_n} - \max_{c \ne y_n} f_{n, c}) / R, \quad
        R = \prod_i s_i \Bigl(\sum_i
        \bigl(\lVert A_i^T - M_i^T \rVert_{2, 1} / s_i\bigr)^{2/3}\Bigr)^{3/2}

    Here :math:`\lVert A^T \rVert_{2, 1}` is the sum of the 2-norms of the rows of :math:`A`. Each
    row belongs to one output. These are the margins of Bartlett, Foster, Telgarsky (2017).

    Args:
        logits: ``[N, C]``, see :func:`marginops.classification_margin`.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        model: The model that computed the logits, see :func:`marginops.log_norm_product`.
        reference: A model with layers of the same shapes, for example a copy made at
            initialisation. By default all :math:`M_i` are 0.
        input: The data :math:`X`, ``[n, ...]``. If it is given, the margins are also divided by
            :math:`\lVert X \rVert_F / n`.
        batch_norm: ``"fold"``, ``"last"`` or ``"affine"``, see :func:`marginops.log_norm_product`.
            Batch norms of ``reference`` count with their own statistics.
        conv: ``"flattened"`` or ``"operator"``, see :func:`marginops.log_norm_product`. With
            ``"operator"`` padding has to be with zeros or circular.
        example_input: See :func:`marginops.log_norm_product`.
        ignore_index: Samples with this target get ``+inf`` and no gradient.

    Returns:
        ``[N]``, float64 for float64 logits, else float32.

    Raises:
        TypeError, ValueError: An argument is wrong, see :func:`marginops.classification_margin`
            and :func:`marginops.log_norm_product`. Or the layers of ``reference`` do not have the
            shapes of those of ``model``.
        RuntimeError: A target is outside [0, C), on the CPU; on CUDA this is a device-side
            assertion. Or a spectral norm did not converge to 1e-6.

    The margins are differentiable (once) in ``logits``, in the weights and batch norms of both
    models, and in ``input``. The result is deterministic. The cost is that of
    :func:`marginops.log_norm_product` with the spectral norm.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> logits = model(torch.tensor([[1.0, 0.0]])).detach()
        >>> marginops.spectrally_normalized_margin(logits, torch.tensor([0]), model).detach()
        tensor([0.5000])
    """
    checks.check_logits(logits)
    factors = factors_of(model, batch_norm, conv, example_input, stacklevel=2)
    checks.check_device("model", factors[0].weight, logits, "logits")
    origins: list[Factor | None] = [None] * len(factors)
    if reference is not None:
        others = factors_of(reference, batch_norm, conv, example_input, 2, "reference")
        _check_reference(others, factors)
        origins = list(others)
    dtype = result_dtype(factors)
    with torch.autocast(logits.device.type, enabled=False):
        norms = log_spectral_norms(factors, dtype, 1e-6)
        distances = torch.stack(
            [
                _log_two_one_norm(factor, origin)
                for factor, origin in zip(factors, origins, strict=True)
            ]
        )
        log_norm = norms.sum() + 1.5 * torch.logsumexp((distances - norms) * (2 / 3), 0)
        if input is not None:
            log_norm = log_norm + _log_size(input, logits)
    return classification_margin(logits, target, log_norm=log_norm, ignore_index=ignore_index)


def _log_two_one_norm(factor: Factor, origin: Factor | None) -> Tensor:
    """The logarithm of ``||A^T - M^T||_{2, 1}``, computed in float64."""
    difference = scaled_weight(factor, torch.float64)
    if origin is not None:
        difference = difference - scaled_weight(origin, torch.float64)
    peak = difference.detach().abs().amax()
    if not 0 < peak.item() < math.inf:
        return peak.log()
    difference = difference / peak
    if factor.is_operator:
        taps = factor.module.kernel_size
        squares = kinds.blocks(factor.module, difference.square())
        squares = squares.flatten(0, 1).unflatten(1, (-1, *taps)).sum(1)
        for meets in convolution.reach(factor):
            # Replaces the first axis of taps by one of output places, as the last axis.
            squares = torch.tensordot(squares, meets.to(squares), dims=([1], [0]))
        norms = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    else:
        norms = torch.linalg.vector_norm(kinds.rows(factor.module, difference), dim=1)
    return norms.sum().log() + peak.log()


def _log_size(input: Any, logits: Tensor) -> Tensor:
    """The logarithm of the Frobenius norm of the data divided by the number of samples."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor [n, ...], got {type(input).__name__}")
    checks.check_tensor("input", input, max(input.dim(), 1), "[n, ...]")
    checks.check_device("input", input, logits, "logits")
    if input.numel() == 0:
        raise ValueError(f"input: expected at least one sample [n, ...], got {list(input.shape)}")
    exact = input.to(torch.promote_types(input.dtype, torch.float32))
    return log_frobenius_norm(exact.reshape(exact.shape[0], -1)) - math.log(exact.shape[0])


def _check_reference(others: list[Factor], factors: list[Factor]) -> None:
    """Check that both models have the same number of layers with the same shapes."""
    if len(others) != len(factors):
        raise ValueError(
            f"reference: expected {len(factors)} layers as in model, got {len(others)}"
        )
    for other, factor in zip(others, factors, strict=True):
        if other.weight.shape != factor.weight.shape:
            raise ValueError(
                f"reference: expected shape {[*factor.weight.shape]} as for {factor.name} of "
                f"model, got {[*other.weight.shape]} for {other.name}"
            )
    checks.check_device("reference", others[0].weight, factors[0].weight, "model")
