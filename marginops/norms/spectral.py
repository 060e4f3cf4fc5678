"""The spectral norm of a matrix. ARPACK in SciPy finds the singular vector of a large one."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import convolution
from . import layers as kinds
from .factors import Factor, scaled_weight

DIRECT = 64  # up to this size, a dense eigenvalue problem is solved without iterations
RESTARTS = 1000


def log_spectral_norm(factor: Factor, dtype: torch.dtype, tolerance: float) -> Tensor:
    """0-d float64, of the weight in ``dtype``."""
    weight: Tensor = _FirstOrder.apply(scaled_weight(factor, dtype))
    peak = weight.detach().abs().amax()
    if not 0 < peak.item() < math.inf:
        return peak.double().log()
    weight = weight / peak
    if factor.is_operator:
        weight = weight.double()
        with torch.no_grad():
            start = random_start(math.prod(convolution.columns(factor)), weight)
            apply = partial(convolution.gram_product, factor, weight)
            vector = leading_eigenvector(apply, start, tolerance, factor.call.name)
        image = convolution.convolve(factor, weight, vector.view(convolution.columns(factor)))
    else:
        blocks = kinds.blocks(factor.module, weight)
        if blocks.shape[1] < blocks.shape[2]:
            blocks = blocks.mT  # It has the same norm, and shorter vectors.
        with torch.no_grad():
            # Single precision is enough for this tolerance, and twice as fast.
            exact = blocks if tolerance >= 1e-6 else blocks.double()
            index, vector = _leading_right_vector(exact, tolerance, factor.call.name)
        image = blocks[index].double() @ vector
    # The vector is a constant. So the gradient of this is that of the norm, but the second
    # derivative is not.
    return torch.linalg.vector_norm(image).log() + peak.double().log()


def _leading_right_vector(blocks: Tensor, tolerance: float, name: str) -> tuple[int, Tensor]:
    """The index of the block with the largest singular value, and its right singular vector.

    The vector is in float64.
    """
    if blocks.shape[2] <= DIRECT:
        blocks = blocks.double()
        grams = blocks.mT @ blocks
        index = int(torch.linalg.eigvalsh(grams)[:, -1].argmax())
        return index, torch.linalg.eigh(grams[index]).eigenvectors[:, -1]
    start = random_start(blocks.shape[2], blocks)
    vectors = [
        leading_eigenvector(partial(_gram_product, block), start, tolerance, name)
        for block in blocks
    ]
    images = blocks @ torch.stack(vectors).to(blocks).unsqueeze(2)
    index = int(torch.linalg.vector_norm(images, dim=(1, 2)).argmax())
    return index, vectors[index]


def _gram_product(matrix: Tensor, vector: Tensor) -> Tensor:
    return matrix.mT @ (matrix @ vector)


def random_start(size: int, like: Tensor) -> Tensor:
    """A random vector, the same in every call and on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(like)


def leading_eigenvector(
    apply: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, name: str
) -> Tensor:
    """Unit eigenvector in float64 for the largest eigenvalue of a symmetric non-negative map.

    It ends when ``|map(v) - value v| <= tolerance * value``. Then there is an eigenvalue within
    ``tolerance * value`` of ``value``.
    """
    size = start.numel()
    if size <= DIRECT:
        matrix = torch.stack([apply(row) for row in torch.eye(size).to(start)]).double()
        return torch.linalg.eigh(matrix).eigenvectors[:, -1]
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise ImportError(
            f"the spectral norm of {name} needs SciPy, which is not installed; "
            'run pip install "marginops[norms]"'
        ) from error

    def product(vector: NDArray[np.float64]) -> NDArray[Any]:
        return apply(torch.from_numpy(vector).to(start)).cpu().numpy()

    try:
        _, vectors = eigsh(
            LinearOperator((size, size), product, dtype=np.float64),
            k=1,
            v0=start.cpu().numpy(),
            tol=tolerance,
            maxiter=RESTARTS,
        )
    except ArpackNoConvergence as error:
        raise RuntimeError(
            f"the spectral norm of {name} did not converge to a tolerance of {tolerance:g} in "
            f"{RESTARTS} restarts of ARPACK; its largest singular values may be too close to each "
            "other"
        ) from error
    return torch.from_numpy(vectors[:, 0]).to(start.device)


class _FirstOrder(torch.autograd.Function):
    """The identity. Its gradient cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
