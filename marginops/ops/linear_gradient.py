"""Gradients of margins and scores of a linear head, for its features, weight and bias."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import margin_pair as pairs
from .class_sum import sum_pairs


class Classes(Protocol):
    """Where the rows of a head are, and where their gradient goes."""

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The rows of the weight (or entries of the bias) of any classes."""

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """See :func:`class_sum.sum_pairs`; for the ``count`` classes that are here."""


class AllHere:
    """A head in one piece."""

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The rows of these classes."""
        return weight[classes]

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """The sums of all classes."""
        return sum_pairs(value, rows, pair, count)


_ALL_HERE = AllHere()


def margin_head_gradient(
    value: Tensor,
    pair: Tensor,
    head: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype | None,
    needs_grad: Sequence[bool],
    of_distance: Tensor | None = None,
    bias_in_norm: bool = False,
    classes: Classes = _ALL_HERE,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum_k value_k (f_i - f_j) + of_distance_k ||w_i - w_j||^2 / 2``.

    (i, j) is the pair of sample k; head is the features of these samples, weight and bias.
    """
    features, weight, bias = head
    # Alike on all ranks that share a head, which have to exchange these rows together.
    if needs_grad[0] or of_distance is not None:
        first, second = (classes.rows(weight, pair[:, side]) for side in (0, 1))
    bias_value = value
    if of_distance is not None and bias is not None and bias_in_norm:
        one, other = (classes.rows(bias, pair[:, side]).to(value.dtype) for side in (0, 1))
        bias_value = value + of_distance * (one - other)
    grad_input = grad_weight = grad_bias = None
    if needs_grad[0]:
        step = _rounded(first, dtype, value) - _rounded(second, dtype, value)
        grad_input = (value.unsqueeze(1) * step).to(features.dtype)
    if needs_grad[1]:
        rows, coefficient = features.to(dtype or features.dtype), value
        if of_distance is not None:
            step = first.to(value.dtype) - second.to(value.dtype)
            rows = value.unsqueeze(1) * rows + of_distance.unsqueeze(1) * step
            coefficient = torch.ones_like(value)
        sums = classes.sum_pairs(coefficient, rows, pair, weight.shape[0])
        grad_weight = sums.to(weight.dtype)
    if needs_grad[2] and bias is not None:
        ones = value.new_ones((value.shape[0], 1))
        sums = classes.sum_pairs(bias_value, ones, pair, weight.shape[0])
        grad_bias = sums.squeeze(1).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


def _rounded(tensor: Tensor, dtype: torch.dtype | None, like: Tensor) -> Tensor:
    """As the product saw it."""
    return tensor.to(dtype or tensor.dtype).to(like.dtype)


def label_pair(
    grad: Tensor,
    target: Tensor,
    rival: Tensor,
    log_norm: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of ``f_y - f_rival``, and these classes; 0 between any two where ignored."""
    ignored = target == ignore_index
    value = torch.where(ignored, 0, pairs.normalize(grad, log_norm))
    return value, torch.stack((torch.where(ignored, 1, target), rival), 1)


def scattered(rows: Tensor | None, indices: Tensor, count: int) -> Tensor | None:
    """[count, D], zero but for the rows of the chosen samples."""
    if rows is None:
        return None
    # In place: autocast takes the other index_copy for its own, and fails on other dtypes.
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, indices, rows)


class _SavedDistance(torch.autograd.Function):
    """The distance that the forward pass kept, a function of the weight with no derivative."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return distance.view_as(distance)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "linear_minimal_margin_score: second derivatives are not implemented"
        )


def once(distance: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Without this, a second derivative would take the distance for a constant without a word."""
    return _SavedDistance.apply(distance, weight, bias) if torch.is_grad_enabled() else distance
