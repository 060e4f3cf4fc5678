"""The spectral complexity of a model, as a logarithm."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as checks
from .factors import BatchNorm, Convolution, Factor, factors_of, result_dtype
from .rows import log_size, log_two_one_norm
from .spectral import log_spectral_norm


def log_spectral_complexity(
    model: nn.Module,
    reference: nn.Module | None = None,
    input: Tensor | None = None,
    *,
    batch_norm: BatchNorm = "fold",
    conv: Convolution = "flattened",
    example_input: Tensor | tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Logarithm of the spectral complexity of a model.

    Let :math:`A_i` be the matrices of the layers, :math:`s_i` their spectral norms and :math:`M_i`
    the matrices of ``reference``:

    .. math:: \log R = \sum_i \log s_i + \tfrac{3}{2} \log \sum_i
        \bigl(\lVert A_i^T - M_i^T \rVert_{2, 1} / s_i\bigr)^{2/3}

    Here :math:`\lVert A^T \rVert_{2, 1}` is the sum of the 2-norms of the rows of :math:`A`. Each
    row belongs to one output. ``classification_margin(..., log_norm=...)`` computes the margins of
    Bartlett, Foster, Telgarsky (2017) with it.

    Args:
        model: A model, see :func:`marginops.log_norm_product`.
        reference: A model with layers of the same shapes, for example a copy made at
            initialisation. By default all :math:`M_i` are 0.
        input: The data :math:`X`, ``[n, ...]``, on the device of the model. If it is given, the
            complexity is multiplied by :math:`\lVert X \rVert_F / n`.
        batch_norm: ``"fold"``, ``"last"`` or ``"affine"``, see :func:`marginops.log_norm_product`.
            Batch norms of ``reference`` count with their own statistics.
        conv: ``"flattened"`` or ``"operator"``, see :func:`marginops.log_norm_product`. With
            ``"operator"`` padding has to be with zeros or circular.
        example_input: See :func:`marginops.log_norm_product`.

    Returns:
        A 0-d tensor on the device of the weights, float64 if a weight is float64, else float32. It
        is ``-inf`` if the layers of ``model`` and ``reference`` are equal.

    Raises:
        TypeError, ValueError: An argument is wrong, see :func:`marginops.log_norm_product`, or the
            layers of ``reference`` do not have the shapes of those of ``model``.
        RuntimeError: A spectral norm did not converge to 1e-6.
        ImportError: SciPy is missing, which finds the spectral norm of larger matrices, see
            ``tolerance`` of :func:`marginops.log_norm_product`.

    The logarithm is differentiable (once) in the weights and batch norms of both models, and in
    ``input``. The result is deterministic. The cost is that of :func:`marginops.log_norm_product`
    with the spectral norm.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> log_norm = marginops.log_spectral_complexity(model).detach()
        >>> logits = model(torch.tensor([[1.0, 0.0]])).detach()
        >>> marginops.classification_margin(logits, torch.tensor([0]), log_norm=log_norm)
        tensor([0.5000])
    """
    factors = factors_of(model, batch_norm, conv, example_input, stacklevel=2)
    origins: list[Factor | None] = [None] * len(factors)
    if reference is not None:
        try:
            others = factors_of(reference, batch_norm, conv, example_input, stacklevel=2)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("model:", "reference:", 1)) from error
        _check_reference(others, factors)
        origins = list(others)
    if input is not None:
        _check_input(input, factors[0].weight)
    dtype = result_dtype(factors)
    with torch.autocast(factors[0].weight.device.type, enabled=False):
        norms = torch.stack([log_spectral_norm(factor, dtype, 1e-6) for factor in factors])
        distances = torch.stack(list(map(log_two_one_norm, factors, origins)))
        log_norm = norms.sum() + 1.5 * torch.logsumexp((distances - norms) * (2 / 3), 0)
        if input is not None:
            log_norm = log_norm + log_size(input)
        return log_norm.to(dtype)


def _check_input(input: Any, weight: Tensor) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a tensor [n, ...], got {type(input).__name__}")
    checks.check_tensor("input", input, max(input.dim(), 1), "[n, ...]")
    checks.check_device("input", input, weight, "model")
    if input.numel() == 0:
        raise ValueError(f"input: expected at least one sample [n, ...], got {list(input.shape)}")


def _check_reference(others: list[Factor], factors: list[Factor]) -> None:
    """Check that both models have the same number of layers with the same shapes."""
    if len(others) != len(factors):
        raise ValueError(
            f"reference: expected {len(factors)} layers as in model, got {len(others)}"
        )
    for other, factor in zip(others, factors, strict=True):
        if other.weight.shape != factor.weight.shape:
            raise ValueError(
                f"reference: expected shape {[*factor.weight.shape]} as for {factor.call.name} of "
                f"model, got {[*other.weight.shape]} for {other.call.name}"
            )
    checks.check_device("reference", others[0].weight, factors[0].weight, "model")
