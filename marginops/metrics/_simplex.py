"""How far class means and weight are from a simplex, and classes from their means."""

import torch
from torch import Tensor

from ._scatter import Scatter


def within_over_between(scatter: Scatter, means: Tensor) -> Tensor:
    """``tr(S_W pinv(S_B)) / C``, where ``S_B = M^T M / C = V S^2 V^T / C``."""
    # The decomposition of a matrix with NaN raises an error, so zeros replace such a matrix.
    finite = means.isfinite().all()
    _, singular, directions = torch.linalg.svd(torch.where(finite, means, 0), full_matrices=False)
    rank = min(len(means) - 1, means.shape[1])
    singular, directions = singular[:rank], directions[:rank]
    rounding = torch.finfo(means.dtype).eps * max(means.shape)
    kept = singular > rounding * singular[0]
    along = ((directions @ scatter.symmetric_within()) * directions).sum(1)
    variance = along / scatter.samples.sum()
    ratio = torch.where(kept, variance / singular.square(), 0).sum()
    return torch.where(kept.any() & finite, ratio, torch.nan)


def distance_to_simplex(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The deviations of the rows from equal norms and from the angles of a simplex."""
    classes = len(rows)
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / norm
    deviation = (unit @ unit.T + 1 / (classes - 1)).abs().fill_diagonal_(0)
    return norm.std(correction=0) / norm.mean(), deviation.sum() / (classes * (classes - 1))
