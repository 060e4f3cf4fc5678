"""A convolution as one matrix, which maps its whole input to its whole output."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layers as kinds
from .factors import Factor

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def columns(factor: Factor) -> tuple[int, ...]:
    """The shape ``[1, in, ...]`` of one input, which has an entry for each column."""
    assert factor.call.shapes is not None
    sizes = factor.call.shapes[0][2 - factor.weight.dim() :]
    return (1, factor.module.in_channels, *sizes)


def convolve(factor: Factor, weight: Tensor, input: Tensor) -> Tensor:
    """The output of the layer for ``input``, without the bias."""
    module, shapes = factor.module, factor.call.shapes
    if isinstance(module, kinds.CONVOLUTIONS):
        return module._conv_forward(input, weight, None)
    assert shapes is not None
    axes = weight.dim() - 2
    how = module.stride, module.padding
    # A caller of the layer may pass output_size, so the output padding follows from the sizes.
    extra = module._output_padding(
        input, list(shapes[1][-axes:]), *how, module.kernel_size, axes, module.dilation
    )
    return _TRANSPOSED[axes](input, weight, None, *how, extra, module.groups, module.dilation)


def gram_product(factor: Factor, weight: Tensor, vector: Tensor) -> Tensor:
    """``A^T A vector``, where A is the matrix. Autograd computes the adjoint."""
    with torch.inference_mode(False), torch.enable_grad():
        input = vector.clone().view(columns(factor)).requires_grad_()
        output = convolve(factor, weight.detach().clone(), input)
        return torch.autograd.grad(output, input, output.detach())[0].flatten()


def row_norms(factor: Factor, weight: Tensor) -> Tensor:
    """``[rows]``, the 2-norm of each row: the squares of the weight, convolved with ones.

    With mirrored padding, or circular padding of a small input, several taps may meet the same
    input. Then their sum would have to be squared. So such padding raises an error.
    """
    module, shape = factor.module, columns(factor)
    mode = getattr(module, "padding_mode", "zeros")
    reaches = zip(module.dilation, module.kernel_size, shape[2:], strict=True)
    wraps = mode == "circular" and any(d * (k - 1) >= size for d, k, size in reaches)
    pads = any(getattr(module, "_reversed_padding_repeated_twice", ()))
    if pads and (wraps or mode not in ("zeros", "circular")):
        raise ValueError(
            "conv: expected padding with zeros, or circular padding of an input larger than the "
            f'kernel, for this norm with "operator", got {factor.call.name} with '
            f"padding_mode={mode!r}"
        )
    peak = weight.detach().abs().amax()
    peak = torch.where((peak > 0) & peak.isfinite(), peak, 1)
    squares = convolve(factor, (weight / peak).square(), weight.new_ones(shape)).flatten()
    # The square root has no derivative at 0.
    is_positive = ~(squares <= 0)
    return torch.where(is_positive, torch.where(is_positive, squares, 1).sqrt(), 0) * peak
