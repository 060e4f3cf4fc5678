"""The largest singular value of a linear map, and the right singular vector of it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

APPLICATIONS = 5000
DIRECT = 64  # up to this size, a dense eigenvalue problem is solved without iterations
GRAM = 1024  # up to this size, the product with the transpose is computed
_BASIS_ELEMENTS = 2**24

Map = Callable[[Tensor], Tensor]


def random_start(size: int, like: Tensor) -> Tensor:
    """A random vector, the same in every call and on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(like)


def leading_eigenvector(apply: Map, start: Tensor, tolerance: float, name: str) -> Tensor:
    """Unit eigenvector for the largest eigenvalue of a symmetric non-negative map.

    The method is that of Lanczos. It makes each new vector orthogonal to all vectors before it.
    When the basis is full, it restarts from the better half of the approximations (Wu, Simon,
    2000). It ends when ``|map(v) - value v| <= tolerance * value``. Then there is an eigenvalue
    within ``tolerance * value`` of ``value``.
    """
    size = start.numel()
    capacity = size if size <= GRAM else max(16, min(256, _BASIS_ELEMENTS // size))
    basis = start.new_empty(capacity, size)
    # The matrix of the map in the basis.
    projected = torch.zeros(capacity, capacity, dtype=torch.float64)
    vector, used, look = start / torch.linalg.vector_norm(start), 0, 8
    for _ in range(APPLICATIONS):
        basis[used] = vector
        used += 1
        known, image = basis[:used], apply(vector)
        before = torch.linalg.vector_norm(image)
        row = known @ image
        image = image - row @ known
        again = known @ image
        image = image - again @ known
        projected[used - 1, :used] = projected[:used, used - 1] = (row + again).double().cpu()
        rest, before = torch.stack([torch.linalg.vector_norm(image), before]).tolist()
        ends = rest <= 4 * torch.finfo(image.dtype).eps * before or used == size
        if ends or used >= look or used == capacity:
            values, vectors = torch.linalg.eigh(projected[:used, :used])
            if ends or rest * abs(vectors[-1, -1].item()) <= tolerance * values[-1].item():
                return vectors[:, -1].to(basis) @ known
            look = used + used // 4 + 4
            if used == capacity:
                used, look = capacity // 2, 0
                basis[:used] = vectors[:, -used:].T.to(basis) @ known
                projected.zero_().diagonal()[:used] = values[-used:]
        vector = image / rest
    raise RuntimeError(
        f"tolerance: expected the spectral norm of {name} to converge to {tolerance:g}, got no "
        f"convergence in {APPLICATIONS} iterations; its largest singular values may be too close "
        "to each other"
    )


def leading_right_vector(blocks: Tensor, tolerance: float, name: str) -> tuple[int, Tensor]:
    """The index of the block with the largest singular value, and its right singular vector.

    Args:
        blocks: ``[groups, rows, columns]``, real or complex, of magnitude around 1.
        tolerance: See :func:`leading_eigenvector`.
        name: The name of the matrix in messages.
    """
    wide = blocks.shape[1] < blocks.shape[2]
    side = min(blocks.shape[1:])
    if side > GRAM:
        found = [_iterated(block, wide, tolerance, name) for block in blocks]
    else:
        gram = blocks @ blocks.mH if wide else blocks.mH @ blocks
        if side <= DIRECT:
            best = int(torch.linalg.eigvalsh(gram)[:, -1].argmax())
            vector = torch.linalg.eigh(gram[best]).eigenvectors[:, -1]
            return best, _right(blocks[best], vector, wide)
        start = random_start(side, gram)
        found = [
            _right(block, leading_eigenvector(g.mv, start, tolerance, name), wide)
            for block, g in zip(blocks, gram, strict=True)
        ]
    sizes = [
        torch.linalg.vector_norm(block @ vector)
        for block, vector in zip(blocks, found, strict=True)
    ]
    best = int(torch.stack(sizes).argmax())
    return best, found[best]


def _iterated(block: Tensor, wide: bool, tolerance: float, name: str) -> Tensor:
    adjoint = block.mH
    first, second = (adjoint, block) if wide else (block, adjoint)
    start = random_start(first.shape[1], block)
    vector = leading_eigenvector(lambda v: second @ (first @ v), start, tolerance, name)
    return _right(block, vector, wide)


def _right(block: Tensor, vector: Tensor, is_left: bool) -> Tensor:
    """The right singular vector. ``vector`` is that vector or, with ``is_left``, the left one."""
    if not is_left:
        return vector
    vector = block.mH @ vector
    norm = torch.linalg.vector_norm(vector)
    # For the zero matrix every unit vector is a right singular vector.
    return torch.where(norm > 0, vector / norm, 1 / math.sqrt(vector.numel()))
