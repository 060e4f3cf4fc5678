"""Margins, scores and selections of a linear head from its features.

The forward pass keeps the pair of classes of every sample, so the gradient needs no logits: it is
that of the difference of two rows of the weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import checked_target, result_dtype
from . import margin_pair as pairs
from . import row_sums
from ._library import Op
from .linear_gradient import label_pair, margin_head_gradient, once, scattered
from .margin_gradient import boundary_gradient, log_norm_gradient
from .row_sums import RowSums
from .select import select_smallest_op
from .tiles import logit_tiles, tile_shape

Tensors = tuple[Tensor, ...]


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


class LinearClassificationMarginOp(Op):
    """Margins and rivals of a linear head."""

    schema = (
        "linear_classification_margin(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
        " Tensor? log_norm, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
        " -> (Tensor, Tensor)"
    )
    has_kernels = False

    @staticmethod
    def reference(
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
            ignored, label = checked_target(target, len(weight), ignore_index)
            rows = head_sums(input, weight, bias, label, dtype, shape, False)
            return row_sums.finish_exactly(rows, label, ignored, None, log_norm)[:2]
        parts = [
            pairs.classification_margin_rival_op(logits, target[rows], log_norm, None, ignore_index)
            for rows, _, logits in logit_tiles(input, weight, bias, dtype, shape)
        ]
        return join(parts)

    @staticmethod
    def fake(input: Tensor, *_: Any) -> Tensors:
        return _like(input, input.shape[0], "value", "class")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.ignore_index, ctx.dtype, _ = inputs
        margin, rival = output
        ctx.save_for_backward(*tensors, rival, margin if ctx.needs_input_grad[4] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, log_norm, rival, margin = ctx.saved_tensors
        value, pair = label_pair(grad, target, rival, log_norm, ctx.ignore_index)
        gradients = margin_head_gradient(
            value, pair, (input, weight, bias), ctx.dtype, ctx.needs_input_grad
        )
        grad_log_norm = log_norm_gradient(grad, margin, target, ctx.ignore_index)
        return *gradients, None, grad_log_norm, None, None, None


linear_classification_margin_op = LinearClassificationMarginOp()


class LinearMinimalMarginScoreOp(Op):
    """Scores of a linear head, with the pair of each and its distance."""

    schema = (
        "linear_minimal_margin_score(Tensor input, Tensor weight, Tensor? bias, bool bias_in_norm,"
        " bool nearest, ScalarType? dtype, int? chunk_bytes) -> (Tensor, Tensor, Tensor)"
    )
    has_kernels = False

    @staticmethod
    def reference(
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
            distance = pairs.pair_distance_op(norm_weight, norm_bias, pair)
            distance = torch.where(rows.has_nan, torch.nan, distance)
            return pairs.boundary_distance(difference, distance), pair, distance
        parts = []
        for _, _, logits in logit_tiles(input, weight, bias, dtype, shape):
            pair, distance = pairs.minimal_margin_pair_op(
                logits, norm_weight, norm_bias, None, nearest
            )
            first, second = logits.gather(1, pair).to(distance.dtype).unbind(1)
            parts.append((pairs.boundary_distance(first - second, distance), pair, distance))
        return join(parts)

    @staticmethod
    def fake(input: Tensor, *_: Any) -> Tensors:
        return _like(input, input.shape[0], "value", "pair", "value")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.bias_in_norm, _, ctx.dtype, _ = inputs
        score, pair, distance = output
        ctx.mark_non_differentiable(distance)
        ctx.save_for_backward(*tensors, score, pair, distance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, score, pair, distance = ctx.saved_tensors
        slope, of_distance = boundary_gradient(grad, score, once(distance, weight, bias))
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


linear_minimal_margin_score_op = LinearMinimalMarginScoreOp()


class LinearSelectClassificationMarginOp(Op):
    """The k smallest margins of a linear head, their indices and their rivals."""

    schema = (
        "linear_select_classification_margin(Tensor input, Tensor weight, Tensor? bias,"
        " Tensor target, Tensor? log_norm, SymInt k, int ignore_index, ScalarType? dtype,"
        " int? chunk_bytes) -> (Tensor, Tensor, Tensor)"
    )
    has_kernels = False

    @staticmethod
    def reference(
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
        margin, rival = LinearClassificationMarginOp.reference(
            input, weight, bias, target, log_norm, ignore_index, dtype, chunk_bytes
        )
        scores, indices = select_smallest_op(margin, k)
        return scores, indices, rival[indices]

    @staticmethod
    def fake(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        log_norm: Tensor | None,
        k: int,
        *_: Any,
    ) -> Tensors:
        return _like(input, k, "value", "class", "class")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, _, ctx.ignore_index, ctx.dtype, _ = inputs
        scores, indices, rival = output
        ctx.save_for_backward(*tensors, indices, rival, scores if ctx.needs_input_grad[4] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, log_norm, indices, rival, scores = ctx.saved_tensors
        target = target[indices]
        value, pair = label_pair(grad, target, rival, log_norm, ctx.ignore_index)
        grad_input, *gradients = margin_head_gradient(
            value, pair, (input[indices], weight, bias), ctx.dtype, ctx.needs_input_grad
        )
        grad_input = scattered(grad_input, indices, input.shape[0])
        grad_log_norm = log_norm_gradient(grad, scores, target, ctx.ignore_index)
        return grad_input, *gradients, None, grad_log_norm, None, None, None, None


linear_select_classification_margin_op = LinearSelectClassificationMarginOp()


class LinearSelectMinimalMarginOp(Op):
    """The k smallest scores of a linear head, their indices, pairs and distances."""

    schema = (
        "linear_select_minimal_margin(Tensor input, Tensor weight, Tensor? bias, SymInt k,"
        " bool bias_in_norm, bool nearest, ScalarType? dtype, int? chunk_bytes)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )
    has_kernels = False

    @staticmethod
    def reference(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        bias_in_norm: bool,
        nearest: bool,
        dtype: torch.dtype | None,
        chunk_bytes: int | None,
    ) -> Tensors:
        score, pair, distance = LinearMinimalMarginScoreOp.reference(
            input, weight, bias, bias_in_norm, nearest, dtype, chunk_bytes
        )
        scores, indices = select_smallest_op(score, k)
        return scores, indices, pair[indices], distance[indices]

    @staticmethod
    def fake(input: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: Any) -> Tensors:
        return _like(input, k, "value", "class", "pair", "value")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, _, ctx.bias_in_norm, _, ctx.dtype, _ = inputs
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, scores, indices, pair, distance = ctx.saved_tensors
        slope, of_distance = boundary_gradient(grad, scores, once(distance, weight, bias))
        grad_input, *gradients = margin_head_gradient(
            slope,
            pair,
            (input[indices], weight, bias),
            ctx.dtype,
            ctx.needs_input_grad,
            of_distance,
            ctx.bias_in_norm,
        )
        grad_input = scattered(grad_input, indices, input.shape[0])
        return grad_input, *gradients, None, None, None, None, None


linear_select_minimal_margin_op = LinearSelectMinimalMarginOp()
