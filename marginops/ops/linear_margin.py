"""Margins, scores and selections of a linear head from its features.

The forward pass keeps the pair of classes of every sample, so the gradient needs no logits: it is
that of the difference of two rows of the weight.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import margin_pair as pairs
from . import row_sums
from ._library import define, raise_no_second_derivative, result_dtype
from .chunks import logit_tiles, tile_shape
from .margin_gradient import boundary_gradient, log_norm_gradient, sum_pairs
from .row_sums import RowSums
from .select import select_smallest_op

Tensors = tuple[Tensor, ...]


def _margin(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    log_norm: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
) -> Tensors:
    shape = tile_shape(input, weight, dtype, chunk_bytes)
    if shape[1] < len(weight):
        ignored, label = pairs.checked_target(target, len(weight), ignore_index)
        rows = head_sums(input, weight, bias, label, dtype, shape, False)
        return row_sums.finish_exactly(rows, label, ignored, None, log_norm)[:2]
    parts = [
        pairs.classification_margin_rival(logits, target[rows], log_norm, None, ignore_index)
        for rows, _, logits in logit_tiles(input, weight, bias, dtype, shape)
    ]
    return join(parts)


def head_sums(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    dtype: torch.dtype | None,
    shape: tuple[int, int],
    with_sums: bool,
) -> RowSums:
    """The sums of all rows, from those of tiles; margins and scores need none."""
    complete, parts = [], []
    for rows, classes, logits in logit_tiles(input, weight, bias, dtype, shape):
        parts.append(row_sums.piece_sums(logits, label[rows], classes, with_sums))
        if classes.stop == len(weight):
            complete.append(row_sums.merge(parts))
            parts = []
    return RowSums(*join(complete))


def join(parts: Sequence[Tensors]) -> Tensors:
    """The results of all chunks, each in one piece."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def in_norm(
    weight: Tensor, bias: Tensor | None, bias_in_norm: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """What the norms of scores are of; autocast allows any mixture of dtypes."""
    bias = bias if bias_in_norm else None
    if dtype is None:
        return weight, bias
    return weight.float(), None if bias is None else bias.float()


def _score(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bias_in_norm: bool,
    nearest: bool,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
) -> Tensors:
    norm_weight, norm_bias = in_norm(weight, bias, bias_in_norm, dtype)
    shape = tile_shape(input, weight, dtype, chunk_bytes, whole_rows=nearest)
    if shape[1] < len(weight):
        label = torch.zeros(len(input), dtype=torch.int64, device=input.device)
        rows = head_sums(input, weight, bias, label, dtype, shape, False)
        pair, difference = row_sums.top_pair(rows)
        distance = pairs.pair_distance(norm_weight, norm_bias, pair)
        distance = torch.where(rows.has_nan, torch.nan, distance)
        return pairs.boundary_distance(difference, distance), pair, distance
    parts = []
    for _, _, logits in logit_tiles(input, weight, bias, dtype, shape):
        pair, distance = pairs.minimal_margin_pair(logits, norm_weight, norm_bias, None, nearest)
        first, second = logits.gather(1, pair).to(distance.dtype).unbind(1)
        parts.append((pairs.boundary_distance(first - second, distance), pair, distance))
    return join(parts)


def _select_margin(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    log_norm: Tensor | None,
    k: int,
    ignore_index: int,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
) -> Tensors:
    margin, rival = _margin(input, weight, bias, target, log_norm, ignore_index, dtype, chunk_bytes)
    scores, indices = select_smallest_op(margin, k)
    return scores, indices, rival[indices]


def _select_score(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    bias_in_norm: bool,
    nearest: bool,
    dtype: torch.dtype | None,
    chunk_bytes: int | None,
) -> Tensors:
    score, pair, distance = _score(input, weight, bias, bias_in_norm, nearest, dtype, chunk_bytes)
    scores, indices = select_smallest_op(score, k)
    return scores, indices, pair[indices], distance[indices]


def _like(input: Tensor, rows: int, *kinds: str) -> Tensors:
    """Empty results: of the result dtype, int64 indices, or int64 pairs."""
    dtype = result_dtype(input.dtype)
    return tuple(
        input.new_empty(
            (rows, 2) if kind == "pair" else (rows,),
            dtype=dtype if kind == "value" else torch.int64,
        )
        for kind in kinds
    )


class Classes(Protocol):
    """Where the rows of a head are, and where their gradient goes."""

    def rows(self, weight: Tensor, classes: Tensor) -> Tensor:
        """The rows of the weight (or entries of the bias) of any classes."""

    def sum_pairs(self, value: Tensor, rows: Tensor, pair: Tensor, count: int) -> Tensor:
        """See :func:`margin_gradient.sum_pairs`; for the ``count`` classes that are here."""


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


def _scattered(rows: Tensor | None, indices: Tensor, count: int) -> Tensor | None:
    """[count, D], zero but for the rows of the chosen samples."""
    if rows is None:
        return None
    # In place: autocast takes the other index_copy for its own, and fails on other dtypes.
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, indices, rows)


def _margin_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.ignore_index, ctx.dtype, _ = inputs
    margin, rival = output
    ctx.save_for_backward(*tensors, rival, margin if ctx.needs_input_grad[4] else None)


def _margin_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    input, weight, bias, target, log_norm, rival, margin = ctx.saved_tensors
    value, pair = label_pair(grad, target, rival, log_norm, ctx.ignore_index)
    gradients = margin_head_gradient(
        value, pair, (input, weight, bias), ctx.dtype, ctx.needs_input_grad
    )
    grad_log_norm = log_norm_gradient(grad, margin, target, ctx.ignore_index)
    return *gradients, None, grad_log_norm, None, None, None


def _score_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.bias_in_norm, _, ctx.dtype, _ = inputs
    score, pair, distance = output
    ctx.mark_non_differentiable(distance)
    ctx.save_for_backward(*tensors, score, pair, distance)


class _SavedDistance(torch.autograd.Function):
    """The distance that the forward pass kept, a function of the weight with no derivative."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return distance.view_as(distance)

    backward = staticmethod(raise_no_second_derivative("linear_minimal_margin_score"))


def _once(distance: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Without this, a second derivative would take the distance for a constant without a word."""
    return _SavedDistance.apply(distance, weight, bias) if torch.is_grad_enabled() else distance


def _score_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    input, weight, bias, score, pair, distance = ctx.saved_tensors
    slope, of_distance = boundary_gradient(grad, score, _once(distance, weight, bias))
    gradients = margin_head_gradient(
        slope,
        pair,
        (input, weight, bias),
        ctx.dtype,
        ctx.needs_input_grad,
        of_distance,
        ctx.bias_in_norm,
    )
    return *gradients, None, None, None, None


def _select_margin_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, _, ctx.ignore_index, ctx.dtype, _ = inputs
    scores, indices, rival = output
    ctx.save_for_backward(*tensors, indices, rival, scores if ctx.needs_input_grad[4] else None)


def _select_margin_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    input, weight, bias, target, log_norm, indices, rival, scores = ctx.saved_tensors
    target = target[indices]
    value, pair = label_pair(grad, target, rival, log_norm, ctx.ignore_index)
    grad_input, *gradients = margin_head_gradient(
        value, pair, (input[indices], weight, bias), ctx.dtype, ctx.needs_input_grad
    )
    grad_input = _scattered(grad_input, indices, input.shape[0])
    grad_log_norm = log_norm_gradient(grad, scores, target, ctx.ignore_index)
    return grad_input, *gradients, None, grad_log_norm, None, None, None, None


def _select_score_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, _, ctx.bias_in_norm, _, ctx.dtype, _ = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*tensors, *output)


def _select_score_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    input, weight, bias, scores, indices, pair, distance = ctx.saved_tensors
    slope, of_distance = boundary_gradient(grad, scores, _once(distance, weight, bias))
    grad_input, *gradients = margin_head_gradient(
        slope,
        pair,
        (input[indices], weight, bias),
        ctx.dtype,
        ctx.needs_input_grad,
        of_distance,
        ctx.bias_in_norm,
    )
    grad_input = _scattered(grad_input, indices, input.shape[0])
    return grad_input, *gradients, None, None, None, None, None


linear_classification_margin_op = define(
    "linear_classification_margin(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor? log_norm, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
    " -> (Tensor, Tensor)",
    _margin,
    lambda input, *_: _like(input, input.shape[0], "value", "class"),
    backward=_margin_backward,
    setup_context=_margin_context,
    native=False,
)
linear_minimal_margin_score_op = define(
    "linear_minimal_margin_score(Tensor input, Tensor weight, Tensor? bias, bool bias_in_norm,"
    " bool nearest, ScalarType? dtype, int? chunk_bytes) -> (Tensor, Tensor, Tensor)",
    _score,
    lambda input, *_: _like(input, input.shape[0], "value", "pair", "value"),
    backward=_score_backward,
    setup_context=_score_context,
    native=False,
)
linear_select_smallest_margin_op = define(
    "linear_select_smallest_margin(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor? log_norm, SymInt k, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
    " -> (Tensor, Tensor, Tensor)",
    _select_margin,
    lambda input, weight, bias, target, log_norm, k, *_: _like(input, k, "value", "class", "class"),
    backward=_select_margin_backward,
    setup_context=_select_margin_context,
    native=False,
)
linear_select_minimal_margin_op = define(
    "linear_select_minimal_margin(Tensor input, Tensor weight, Tensor? bias, SymInt k,"
    " bool bias_in_norm, bool nearest, ScalarType? dtype, int? chunk_bytes)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _select_score,
    lambda input, weight, bias, k, *_: _like(input, k, "value", "class", "pair", "value"),
    backward=_select_score_backward,
    setup_context=_select_score_context,
    native=False,
)
