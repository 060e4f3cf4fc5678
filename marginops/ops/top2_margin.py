"""The difference of a row's two largest logits, or of their probabilities, and its gradient."""

import torch
from torch import Tensor

from .margin_gradient import scatter_pair, write
from .row_sums import (
    IGNORED,
    NOT_IN_PIECE,
    RowSums,
    row_sums_op,
    row_sums_reference,
    top_pair,
)
from .statistics_gradient import sample_statistics_gradient_op


def top2_margin_reference(logits: Tensor, softmax: bool) -> Tensor:
    """``f_i1 - f_i2`` of every row or, with ``softmax``, ``p_i1 - p_i2``."""
    label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = row_sums_reference(logits, label)
    return _probability_margin(rows) if softmax else top_pair(rows)[1]


def _probability_margin(rows: RowSums) -> Tensor:
    """``p_i1 - p_i2`` without the difference of two close numbers. A tie gives +0.0."""
    maximum, second, _, others = rows.values[:, :4].unbind(1)
    return (0 - torch.expm1(second - maximum)) / (1 + others)


def top2_margin_gradient(
    grad: Tensor, logits: Tensor, rows: Tensor | None, softmax: bool
) -> Tensor:
    """The gradient of the margins of ``rows`` (all if None) in the logits."""
    chosen = logits if rows is None else logits[rows]
    unlabelled = torch.full_like(chosen[:, 0], NOT_IN_PIECE, dtype=torch.int64)
    sums = RowSums(*row_sums_op(chosen.detach(), unlabelled, softmax))
    pair, _ = top_pair(sums)
    if not softmax:
        return scatter_pair(torch.where(sums.has_nan, torch.nan, grad), pair, rows, logits)
    # The gradient of p_i1 - p_i2 is that of a loss and a margin of the label i1 with the rival i2:
    # (p_i1 - p_i2) * (e_i1 - p) + p_i2 * (e_i1 - e_i2).
    maximum, second, _, others = sums.values[:, :4].unbind(1)
    second_probability = (second - maximum).exp() / (1 + others)
    is_certain = (maximum == torch.inf) & (second < torch.inf)  # the gradient is 0
    first, second_class = pair.unbind(1)
    unused = torch.zeros_like(maximum)
    gradient: Tensor = sample_statistics_gradient_op(
        chosen,
        torch.where(is_certain, IGNORED, first),
        second_class,
        unused,
        unused,
        maximum,
        others.log1p(),
        None,
        grad * second_probability,
        -grad * _probability_margin(sums),
        None,
        None,
        None,
        None,
        IGNORED,
    )
    if rows is None:
        return gradient
    return write("index_copy_", gradient.new_zeros(logits.shape), 0, rows, gradient)
