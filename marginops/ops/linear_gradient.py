"""Gradients of the margins and scores of a linear head. They need no logits."""

from typing import Any

import torch
from torch import Tensor

from . import margin_pair as pairs
from ._library import Op
from .class_sum import ScaledRows
from .linear_head import LinearHead
from .linear_op import Gradients


def pair_gradients(
    head: LinearHead,
    value: Tensor,
    pair: Tensor,
    needs_grad: set[str],
    distance_coefficient: Tensor | None = None,
) -> Gradients:
    """Gradients of ``sum_k value_k (f_i - f_j) + distance_coefficient_k ||w_i - w_j||^2 / 2``.

    (i, j) is the pair of classes of row k of the head.
    """
    place, weight, bias = head.place, head.weight, head.bias
    # ``place.rows`` may exchange rows with other ranks, so all ranks have to call it. They do:
    # this condition has the same value on all ranks.
    if "input" in needs_grad or distance_coefficient is not None:
        first, second = (place.rows(weight, pair[:, side]) for side in (0, 1))
    bias_value = value
    if distance_coefficient is not None and bias is not None and head.bias_in_norm:
        one, other = (place.rows(bias, pair[:, side]).to(value.dtype) for side in (0, 1))
        bias_value = value + distance_coefficient * (one - other)
    gradients: Gradients = {}
    scaled_rows: dict[str, ScaledRows] = {}
    if "input" in needs_grad:
        step = _rounded(first, head.dtype, value) - _rounded(second, head.dtype, value)
        gradients["input"] = (value.unsqueeze(1) * step).to(head.input.dtype)
    if "weight" in needs_grad:
        rows, coefficient = head.input.to(head.dtype or head.input.dtype), value
        if distance_coefficient is not None:
            step = first.to(value.dtype) - second.to(value.dtype)
            rows = value.unsqueeze(1) * rows + distance_coefficient.unsqueeze(1) * step
            coefficient = torch.ones_like(value)
        scaled_rows["weight"] = coefficient, rows
    if "bias" in needs_grad and bias is not None:
        scaled_rows["bias"] = bias_value, value.new_ones((value.shape[0], 1))
    if scaled_rows:
        sums = place.sum_pairs(pair, weight.shape[0], [*scaled_rows.values()])
        for name, total in zip(scaled_rows, sums, strict=True):
            parameter = getattr(head, name)
            gradients[name] = total.view(parameter.shape).to(parameter.dtype)
    return gradients


def _rounded(tensor: Tensor, dtype: torch.dtype | None, like: Tensor) -> Tensor:
    """Round to the dtype of the matrix product, and convert to the dtype of ``like``."""
    return tensor.to(dtype or tensor.dtype).to(like.dtype)


def margin_gradients(
    head: LinearHead, grad: Tensor, rival: Tensor, needs_grad: set[str]
) -> Gradients:
    """Gradients of the margins of all rows in input, weight and bias.

    An ignored row gets the gradient 0 and the label 1, since its rival is class 0.
    """
    ignored = head.ignored
    value = torch.where(ignored, 0, pairs.normalize(grad, head.log_norm))
    pair = torch.stack((torch.where(ignored, 1, head.target), rival), 1)
    return pair_gradients(head, value, pair, needs_grad)


class SavedDistanceOp(Op):
    """Returns the distance that the forward pass saved. It has no gradient on purpose.

    Without this op, a second derivative would take the distance as a constant and be wrong.
    """

    schema = "saved_distance(Tensor distance, Tensor weight, Tensor? bias) -> Tensor"
    row_arguments = ("distance",)
    has_kernels = False

    @staticmethod
    def reference(distance: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return distance.clone()

    @staticmethod
    def fake(distance: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.empty_like(distance)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise NotImplementedError(
            "marginops: second derivatives are not implemented, "
            "and minimal margin scores of a linear head have none"
        )


saved_distance_op = SavedDistanceOp()
