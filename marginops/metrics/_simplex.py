"""How far class means and weight are from a simplex, and classes from their means."""

import torch
from torch import Tensor

from ._scatter import Scatter


def within_over_between(scatter: Scatter, means: Tensor) -> Tensor:
    """``tr(S_W pinv(S_B)) / C``, where ``S_B = M^T M / C = V^T S^2 V / C``."""
    _, singular, directions, kept = singular_directions(means)
    along = ((directions @ scatter.symmetric_within()) * directions).sum(1)
    return ratio_along(along, singular, kept) / scatter.samples.sum()


def singular_directions(means: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, S, V of the centred means U S V, and which singular values count. NaN lets none count."""
    # The decomposition of a matrix with NaN raises an error, so zeros replace such a matrix.
    finite = means.isfinite().all()
    left, singular, directions = torch.linalg.svd(
        torch.where(finite, means, 0), full_matrices=False
    )
    rounding = torch.finfo(means.dtype).eps * max(means.shape)
    kept = (singular > rounding * singular[0]) & finite
    kept[len(means) - 1 :] = False  # the centred means are dependent
    return left, singular, directions, kept


def ratio_along(squares: Tensor, singular: Tensor, kept: Tensor) -> Tensor:
    """The sum of squares over those of the singular values that count; NaN if none does."""
    ratio = torch.where(kept, squares / singular.square(), 0).sum()
    return torch.where(kept.any(), ratio, torch.nan)


def distance_to_simplex(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The deviations of the rows from equal norms and from the angles of a simplex."""
    classes = len(rows)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norm
    deviation = (unit @ unit.T + 1 / (classes - 1)).abs().fill_diagonal_(0)
    return norm.std(correction=0) / norm.mean(), deviation.sum() / (classes * (classes - 1))
