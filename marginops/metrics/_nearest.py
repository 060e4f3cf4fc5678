"""Which samples are nearest to the class mean of their largest logit."""

import torch
from torch import Tensor


def differs_from_nearest(input: Tensor, logits: Tensor, centers: Tensor) -> Tensor:
    r"""Whether the class of the largest logit is not the class of the nearest center.

    Among equal logits or equal distances the lowest class counts. The distances are those of the
    differences :math:`h - m` in float64. The function computes them only where it has to. With
    any origin, :math:`x = h - o` and :math:`y_c = m_c - o`, the distances have the order of

    .. math:: q_c = \lVert y_c \rVert_2^2 - 2 x \cdot y_c,

    which takes one matrix product. Let :math:`s = \max_c \lVert y_c \rVert_2 + \lVert x \rVert_2`,
    and u the unit roundoff. Sums of D products have a relative error of at most D u of the sum of
    their magnitudes, in any order. So rounding changes :math:`q_c` by less than
    :math:`(D + 8) u s^2`, and a squared distance by less than :math:`(D + 8) u s^2` as well. A
    comparison of two classes is safe where they differ by four times as much. The bound in the code
    is twice as large again, which covers the rounding of s and of the bound itself.

    Args:
        input: ``[N, D]``.
        logits: ``[N, C]``.
        centers: ``[C, D]`` float64.

    Returns:
        ``[N]`` float64, 1 or 0. NaN for a sample with a NaN or without a finite distance.
    """
    # On the CPU one part of a large batch fits into the cache.
    size = max(1, len(input)) if input.is_cuda else 2048
    origin = centers.mean(0)
    shifted = centers - origin
    parts = [
        _differs(rows.double(), values, centers, origin, shifted)
        for rows, values in zip(input.split(size), logits.split(size), strict=True)
    ]
    return torch.cat(parts)


def _differs(
    input: Tensor, logits: Tensor, centers: Tensor, origin: Tensor, shifted: Tensor
) -> Tensor:
    rows = input - origin
    order = torch.addmm(shifted.square().sum(1, keepdim=True), shifted, rows.T, alpha=-2)
    scale = torch.linalg.vector_norm(rows, dim=1)
    scale = scale + torch.linalg.vector_norm(shifted, dim=1).max()
    limits = torch.finfo(torch.float64)
    bound = 4 * (input.shape[1] + 8) * (limits.eps * scale.square() + limits.tiny)
    differs, unsure = decide(order, logits, bound)
    if len(unsure) > 0:
        differs[unsure] = differs_exactly(input[unsure], logits[unsure], centers)
    return differs


def decide(order: Tensor, logits: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the class of the largest logit is not the first one in an order of the classes.

    Args:
        order: ``[C, N]``, small where a class is near. The function overwrites it.
        logits: ``[N, C]``.
        bound: ``[N]``. Two classes have a certain order if they differ by more than that.

    Returns:
        ``[N]`` float64, 1 or 0, NaN for a logit NaN; and the samples whose result is not certain.
    """
    largest, predicted = logits.max(1)
    predicted = predicted.unsqueeze(0)
    own = order.gather(0, predicted).squeeze(0)
    other = order.scatter_(0, predicted, torch.inf).amin(0)
    certain = (own - other).abs() > bound  # False where a NaN or an infinite bound is
    differs = (other < own).double().masked_fill_(largest.isnan(), torch.nan)
    return differs, (~certain).nonzero().squeeze(1)


def differs_exactly(input: Tensor, logits: Tensor, centers: Tensor) -> Tensor:
    """As :func:`differs_from_nearest`, from all distances. ``input`` is float64."""
    # Without a matrix product, which would cancel where means are close.
    exact = "donot_use_mm_for_euclid_dist"
    distance, nearest = torch.cdist(input, centers, compute_mode=exact).min(1)
    largest, predicted = logits.max(1)
    comparable = distance.isfinite() & ~largest.isnan()
    return torch.where(comparable, (predicted != nearest).double(), torch.nan)
