"""A convolution as one matrix, which maps its whole input to its whole output."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layers as kinds
from .factors import Factor
from .spectral import leading_eigenvector, leading_right_vector, random_start

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def places(factor: Factor) -> tuple[list[int], list[int]]:
    """The spatial sizes of the input and of the output."""
    dimensions = factor.weight.dim() - 2
    assert factor.call is not None
    return list(factor.call.input[-dimensions:]), list(factor.call.output[-dimensions:])


def convolve(factor: Factor, weight: Tensor, input: Tensor) -> Tensor:
    """The output of the layer for ``input``, without the bias."""
    module = factor.module
    if isinstance(module, kinds.CONVOLUTIONS):
        return module._conv_forward(input, weight, None)
    sizes, results = places(factor)
    # A caller of the layer may pass output_size, so the output padding follows from the sizes.
    smallest = [
        (n - 1) * s - 2 * p + d * (k - 1) + 1
        for n, s, p, d, k in zip(
            sizes,
            module.stride,
            module.padding,
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    ]
    extra = [result - size for result, size in zip(results, smallest, strict=True)]
    return _TRANSPOSED[len(sizes)](
        input, weight, None, module.stride, module.padding, extra, module.groups, module.dilation
    )


def right_vector(factor: Factor, weight: Tensor, tolerance: float) -> Tensor:
    """The input of length 1 for which the output is longest: the right singular vector."""
    sizes, _ = places(factor)
    shape = (1, factor.module.in_channels, *sizes)

    def gram(vector: Tensor) -> Tensor:
        with torch.enable_grad():
            input = vector.view(shape).requires_grad_()
            output = convolve(factor, weight, input)
        return torch.autograd.grad(output, input, output.detach())[0].reshape(-1)

    # Autograd computes the adjoint. It does not work on tensors of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        weight = weight.clone()
        start = random_start(math.prod(shape), weight)
        return leading_eigenvector(gram, start, tolerance, factor.name).view(shape)


def is_circulant(factor: Factor) -> bool:
    """Whether the matrix is circulant, so that the Fourier basis makes it block-diagonal."""
    module = factor.module
    if getattr(module, "padding_mode", "zeros") != "circular":
        return False
    sizes, results = places(factor)
    return all(n == m * s for n, m, s in zip(sizes, results, module.stride, strict=True))


class Symbol:
    """The blocks of a circulant convolution in the Fourier basis.

    With a stride of s, the convolution maps s frequencies of the input to one frequency of the
    output. So the columns of a block are the channels at all s frequencies. For real weights, the
    blocks at a frequency and at its negative are conjugates. So half of the frequencies of the
    first axis are enough.
    """

    def __init__(self, factor: Factor) -> None:
        sizes, self.results = places(factor)
        self.module, device = factor.module, factor.weight.device
        self.waves = []
        for n, s, d, k in zip(
            sizes,
            self.module.stride,
            self.module.dilation,
            self.module.kernel_size,
            strict=True,
        ):
            turns = torch.outer(torch.arange(n), d * torch.arange(k)).remainder(n) / n
            wave = torch.polar(torch.ones_like(turns.double()), 2 * math.pi * turns.double())
            self.waves.append(wave.to(device).unflatten(0, (s, n // s)) / math.sqrt(s))

    def at(self, weight: Tensor, first: int) -> Tensor:
        """The blocks at frequency ``first`` of the first axis, all frequencies of the others.

        Their shape is ``[frequencies * groups, rows, columns]``.
        """
        module = self.module
        groups = module.groups
        parts = weight.to(torch.complex128).unflatten(0, (groups, -1))
        for axis, wave in enumerate(self.waves):
            chosen = wave[:, first : first + 1] if axis == 0 else wave
            parts = torch.tensordot(parts, chosen, dims=([3], [2]))
        # The axes of parts are group, row, column, and then (alias, frequency) for each axis.
        count = len(self.waves)
        aliases, frequencies = range(3, 3 + 2 * count, 2), range(4, 4 + 2 * count, 2)
        parts = parts.permute(*frequencies, 0, 1, 2, *aliases)
        rows = parts.shape[count + 1]
        return parts.reshape(math.prod(parts.shape[: count + 1]), rows, -1)

    def right_vector(self, weight: Tensor, name: str) -> tuple[int, int, Tensor]:
        """The right singular vector, with the frequency of the first axis and the block."""
        found, sizes = [], []
        for first in range(self.results[0] // 2 + 1):
            blocks = self.at(weight, first)
            block, vector = leading_right_vector(blocks, 1e-12, name)
            found.append((first, block, vector))
            sizes.append(torch.linalg.vector_norm(blocks[block] @ vector))
        return found[int(torch.stack(sizes).argmax())]


def reach(factor: Factor) -> list[Tensor]:
    """For each axis, whether each tap meets the input at each output place, ``[k, places]`` bool.

    With mirrored padding, or circular padding of a small input, several taps may meet the same
    input. Then their sum would have to be squared, which this result cannot express. So such
    padding raises an error.
    """
    module = factor.module
    sizes, results = places(factor)
    mode = getattr(module, "padding_mode", "zeros")
    padding = _padding(factor)
    found = []
    for axis, (n, m) in enumerate(zip(sizes, results, strict=True)):
        s, d, k = module.stride[axis], module.dilation[axis], module.kernel_size[axis]
        out, tap = torch.arange(m), torch.arange(k).unsqueeze(1)
        if isinstance(module, kinds.TRANSPOSED):
            source = out + padding[axis] - d * tap
            meets = (source % s == 0) & (source >= 0) & (source // s < n)
        else:
            source = s * out - padding[axis] + d * tap
            meets = (source >= 0) & (source < n)
            uses_padding = not bool(meets.all())
            wraps = mode == "circular" and d * (k - 1) >= n
            if uses_padding and (wraps or mode not in ("zeros", "circular")):
                raise ValueError(
                    f"conv: expected padding with zeros, or circular padding of an input larger "
                    f'than the kernel, for this norm with "operator", got {factor.name} with '
                    f"padding_mode={mode!r}"
                )
            meets = meets | (mode == "circular")
        found.append(meets)
    return found


def _padding(factor: Factor) -> list[int]:
    """The padding before the first place of each axis."""
    module = factor.module
    if module.padding == "same":
        spans = zip(module.dilation, module.kernel_size, strict=True)
        return [d * (k - 1) // 2 for d, k in spans]
    if module.padding == "valid":
        return [0] * len(module.kernel_size)
    return list(module.padding)
