"""Gradients of the results of a linear head in its features, weight and bias."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import result_dtype
from . import margin_pair as pairs
from ._batches import Batch
from ._library import Op
from .class_sum import sum_pairs
from .linear_head import Tensors, join
from .margin_gradient import write
from .row_sums import IGNORED, classes_in_piece
from .statistics import sample_statistics_gradient_op
from .tiles import (
    check_rows,
    default_chunk_bytes,
    logit_tiles,
    pieces,
    row_bytes,
    tile_shape,
)


class HeadLayout(Protocol):
    """Gives access to the rows of a head, which may be spread over processes."""

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The rows of the weight (or entries of the bias) of these classes."""

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """See :func:`class_sum.sum_pairs`; for the ``count`` classes of this process."""


class WholeHead:
    """A head whose classes are all in this process."""

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The rows of these classes."""
        return weight[classes]

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """The sums of all classes."""
        return sum_pairs(value, rows, pair, count)


_WHOLE_HEAD = WholeHead()


def margin_head_gradient(
    value: Tensor,
    pair: Tensor,
    head: tuple[Tensor, Tensor, Tensor | None],
    dtype: torch.dtype | None,
    needs_grad: Sequence[bool],
    distance_coefficient: Tensor | None = None,
    bias_in_norm: bool = False,
    layout: HeadLayout = _WHOLE_HEAD,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``sum_k value_k (f_i - f_j) + distance_coefficient_k ||w_i - w_j||^2 / 2``.

    (i, j) is the pair of classes of sample k. ``head`` holds the features of the samples, the
    weight and the bias.
    """
    features, weight, bias = head
    # ``layout.rows`` may exchange rows with other ranks, so all ranks have to call it. They do:
    # this condition has the same value on all ranks.
    if needs_grad[0] or distance_coefficient is not None:
        first, second = (layout.rows(weight, pair[:, side]) for side in (0, 1))
    bias_value = value
    if distance_coefficient is not None and bias is not None and bias_in_norm:
        one, other = (layout.rows(bias, pair[:, side]).to(value.dtype) for side in (0, 1))
        bias_value = value + distance_coefficient * (one - other)
    grad_input = grad_weight = grad_bias = None
    if needs_grad[0]:
        step = _rounded(first, dtype, value) - _rounded(second, dtype, value)
        grad_input = (value.unsqueeze(1) * step).to(features.dtype)
    if needs_grad[1]:
        rows, coefficient = features.to(dtype or features.dtype), value
        if distance_coefficient is not None:
            step = first.to(value.dtype) - second.to(value.dtype)
            rows = value.unsqueeze(1) * rows + distance_coefficient.unsqueeze(1) * step
            coefficient = torch.ones_like(value)
        sums = layout.sum_pairs(coefficient, rows, pair, weight.shape[0])
        grad_weight = sums.to(weight.dtype)
    if needs_grad[2] and bias is not None:
        ones = value.new_ones((value.shape[0], 1))
        sums = layout.sum_pairs(bias_value, ones, pair, weight.shape[0])
        grad_bias = sums.squeeze(1).to(bias.dtype)
    return grad_input, grad_weight, grad_bias


def _rounded(tensor: Tensor, dtype: torch.dtype | None, like: Tensor) -> Tensor:
    """Round to the dtype of the matrix product, and convert to the dtype of ``like``."""
    return tensor.to(dtype or tensor.dtype).to(like.dtype)


def label_pair(
    grad: Tensor,
    target: Tensor,
    rival: Tensor,
    log_norm: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The gradient in ``f_y - f_rival`` and the pair (y, rival) of every sample.

    An ignored sample gets the gradient 0 and the label 1, since its rival is class 0.
    """
    ignored = target == ignore_index
    value = torch.where(ignored, 0, pairs.normalize(grad, log_norm))
    return value, torch.stack((torch.where(ignored, 1, target), rival), 1)


def scatter_rows(rows: Tensor | None, indices: Tensor, count: int) -> Tensor | None:
    """``[count, D]``: ``rows`` at ``indices``, zeros elsewhere."""
    if rows is None:
        return None
    # In place, because autocast fails on mixed dtypes in index_copy, but not in index_copy_.
    return write("index_copy_", rows.new_zeros(count, rows.shape[1]), 0, indices, rows)


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


class LinearSampleStatisticsGradientOp(Op):
    """Gradients in input, weight and bias. The first two are empty unless they are needed."""

    schema = (
        "linear_sample_statistics_gradient(Tensor input, Tensor weight, Tensor? bias,"
        " Tensor target, Tensor rival, Tensor confidence, Tensor entropy, Tensor maximum,"
        " Tensor log_sum, Tensor? log_norm, Tensor? grad_margin, Tensor? grad_loss,"
        " Tensor? grad_confidence, Tensor? grad_entropy, int ignore_index, ScalarType? dtype,"
        " int? chunk_bytes, bool needs_grad_input, bool needs_grad_weight)"
        " -> (Tensor, Tensor, Tensor)"
    )
    has_kernels = False

    def call_batch(self, batch: Batch) -> Tensors | None:
        """Compute the logits of several elements of the batch at once, as the buffer allows."""
        values = batch.values
        weight, bias = values["weight"], values["bias"]
        if batch.names & {"weight", "bias", "log_norm"}:
            return None
        columns = weight.to(values["dtype"] or weight.dtype)
        count = values["input"].shape[-2]
        half = (values["chunk_bytes"] or default_chunk_bytes(weight)) // 2
        elements = half // max(count * row_bytes(columns, None), 1)
        if elements == 0 or count == 0 or batch.size == 0:
            return None
        head = columns, None if bias is None else bias.to(columns.dtype)
        total = result_dtype(columns.dtype)
        # The same as for logits, with the features in their place.
        names = "input", *sample_statistics_gradient_op.row_arguments[1:]
        joined: list[Any] = [batch.joined(name) for name in names]
        parts = []
        for rows in pieces(batch.size * count, elements * count):
            values_of_rows: list[Any] = [
                value if value is None else value[rows] for value in joined
            ]
            input, *others = values_of_rows
            features = input.to(columns.dtype)
            grad_logits = sample_statistics_gradient_op(
                *(F.linear(features, *head), *others[:6], values["log_norm"], *others[6:]),
                *(None, None, values["ignore_index"]),
            ).unflatten(0, (-1, count))
            unused = grad_logits.new_empty(len(grad_logits), 0, 0)
            grad_input = grad_weight = unused
            if values["needs_grad_input"]:
                grad_input = grad_logits @ columns
            if values["needs_grad_weight"]:
                grad_weight = grad_logits.mT @ features.unflatten(0, (-1, count))
            parts.append((grad_input, grad_weight, grad_logits.sum(1, dtype=total)))
        grad_input, grad_weight, grad_bias = join(parts)
        return (
            grad_input.to(values["input"].dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(weight.dtype if bias is None else bias.dtype),
        )

    @staticmethod
    def reference(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rival: Tensor,
        confidence: Tensor,
        entropy: Tensor,
        maximum: Tensor,
        log_sum: Tensor,
        log_norm: Tensor | None,
        grad_margin: Tensor | None,
        grad_loss: Tensor | None,
        grad_confidence: Tensor | None,
        grad_entropy: Tensor | None,
        ignore_index: int,
        dtype: torch.dtype | None,
        chunk_bytes: int | None,
        needs_grad_input: bool,
        needs_grad_weight: bool,
    ) -> Tensors:
        check_rows(input, target=target, rival=rival)
        check_rows(input, confidence=confidence, entropy=entropy, maximum=maximum, log_sum=log_sum)
        check_rows(
            input,
            grad_margin=grad_margin,
            grad_loss=grad_loss,
            grad_confidence=grad_confidence,
            grad_entropy=grad_entropy,
        )
        saved = confidence, entropy, maximum, log_sum
        grads = grad_margin, grad_loss, grad_confidence, grad_entropy
        target = torch.where(target == ignore_index, IGNORED, target)
        columns = weight.to(dtype or weight.dtype)
        total = result_dtype(columns.dtype)
        grad_input = input.new_empty(input.shape if needs_grad_input else (0, 0))
        grad_weight = columns.new_zeros(columns.shape if needs_grad_weight else (0, 0), dtype=total)
        grad_bias = columns.new_zeros(columns.shape[0], dtype=total)
        # The logits and their gradient exist at the same time, so each gets half of the buffer.
        half = (chunk_bytes or default_chunk_bytes(input)) // 2
        shape = tile_shape(input, columns, None, max(half, columns.dtype.itemsize))
        for rows, classes, logits in logit_tiles(input, columns, bias, columns.dtype, shape):
            local = torch.where(
                target[rows] == IGNORED, IGNORED, classes_in_piece(target[rows], classes)
            )
            grad_logits = sample_statistics_gradient_op(
                logits,
                local,
                classes_in_piece(rival[rows], classes),
                *(value[rows] for value in saved),
                log_norm,
                *(None if grad is None else grad[rows] for grad in grads),
                None,
                None,
                IGNORED,
            )
            if needs_grad_input:
                if classes.start == 0:
                    grad_rows = columns.new_zeros((len(logits), columns.shape[1]), dtype=total)
                _add_product(grad_rows, grad_logits, columns[classes])
                if classes.stop == len(columns):
                    grad_input[rows] = grad_rows
            if needs_grad_weight:
                _add_product(grad_weight[classes], grad_logits.t(), input[rows].to(columns.dtype))
            grad_bias[classes] += grad_logits.sum(0, dtype=total)
            del grad_logits  # otherwise two gradients would exist at the same time
        bias_dtype = weight.dtype if bias is None else bias.dtype
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)

    @staticmethod
    def fake(
        input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *_, needs_grad_input, needs_grad_weight = others
        return (
            input.new_empty(input.shape if needs_grad_input else (0, 0)),
            weight.new_empty(weight.shape if needs_grad_weight else (0, 0)),
            weight.new_empty(weight.shape[:1]) if bias is None else bias.new_empty(bias.shape),
        )


linear_sample_statistics_gradient_op = LinearSampleStatisticsGradientOp()


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add the product of two matrices to ``total``, which is float32 for half precision."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one.mm(other)
