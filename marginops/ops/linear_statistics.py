"""Sample statistics of a linear head from its features, forward and backward in tiles."""

from typing import Any

import torch
from torch import Tensor

from .._checks import checked_target, result_dtype
from . import row_sums, statistics
from ._library import Op
from .linear_gradient import label_pair, margin_head_gradient
from .linear_margin import head_sums, join
from .margin_gradient import log_norm_gradient
from .row_sums import IGNORED, StatisticsFields, within
from .tiles import default_chunk_bytes, logit_tiles, tile_shape

Tensors = tuple[Tensor, ...]


class LinearSampleStatisticsOp(Op):
    """The statistics of a linear head; its results are :class:`StatisticsFields`."""

    schema = (
        "linear_sample_statistics(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
        " Tensor? log_norm, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
        f" -> {statistics.FIELDS}"
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
        norm = torch.cat(
            [
                torch.linalg.vector_norm(part, dim=1, dtype=result_dtype(input.dtype))
                for part in input.split(max(shape[0], 1))
            ]
        )
        if shape[1] < len(weight):
            ignored, label = checked_target(target, len(weight), ignore_index)
            sums = head_sums(input, weight, bias, label, dtype, shape, True)
            return row_sums.finish_exactly(sums, label, ignored, norm, log_norm)
        parts = [
            statistics.sample_statistics_op(
                logits, target[rows], norm[rows], log_norm, ignore_index
            )
            for rows, _, logits in logit_tiles(input, weight, bias, dtype, shape)
        ]
        return join(parts)

    @staticmethod
    def fake(input: Tensor, *_: Any) -> Tensors:
        return statistics.empty_fields(input, input.shape[0], True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.ignore_index, ctx.dtype, ctx.chunk_bytes = inputs
        fields = StatisticsFields._make(output)
        statistics.mark_differentiable(ctx, fields)
        ctx.save_for_backward(
            *tensors,
            fields.rival,
            fields.confidence,
            fields.entropy,
            fields.maximum,
            fields.log_sum,
            fields.margin if ctx.needs_input_grad[4] else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, log_norm, rival, *saved, margin = ctx.saved_tensors
        grad = StatisticsFields._make(grads)
        grad_log_norm = log_norm_gradient(grad.margin, margin, target, ctx.ignore_index)
        of_softmax = grad.loss, grad.confidence, grad.entropy
        if not any(ctx.needs_input_grad[:3]):
            gradients: tuple[Tensor | None, ...] = (None, None, None)
        elif all(value is None for value in of_softmax) and grad.margin is not None:
            value, pair = label_pair(grad.margin, target, rival, log_norm, ctx.ignore_index)
            gradients = margin_head_gradient(
                value, pair, (input, weight, bias), ctx.dtype, ctx.needs_input_grad
            )
        else:
            gradients = linear_sample_statistics_gradient_op(
                input,
                weight,
                bias,
                target,
                rival,
                *saved,
                log_norm,
                grad.margin,
                *of_softmax,
                ctx.ignore_index,
                ctx.dtype,
                ctx.chunk_bytes,
                ctx.needs_input_grad[0],
                ctx.needs_input_grad[1],
            )
            needed = zip(gradients, ctx.needs_input_grad, strict=False)
            gradients = tuple(value if needs else None for value, needs in needed)
        return *gradients, None, grad_log_norm, None, None, None


linear_sample_statistics_op = LinearSampleStatisticsOp()


class LinearSampleStatisticsGradientOp(Op):
    """Gradients of input, weight and bias; the first two are empty unless they are asked for."""

    schema = (
        "linear_sample_statistics_gradient(Tensor input, Tensor weight, Tensor? bias,"
        " Tensor target, Tensor rival, Tensor confidence, Tensor entropy, Tensor maximum,"
        " Tensor log_sum, Tensor? log_norm, Tensor? grad_margin, Tensor? grad_loss,"
        " Tensor? grad_confidence, Tensor? grad_entropy, int ignore_index, ScalarType? dtype,"
        " int? chunk_bytes, bool of_input, bool of_weight) -> (Tensor, Tensor, Tensor)"
    )
    has_kernels = False

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
        of_input: bool,
        of_weight: bool,
    ) -> Tensors:
        saved = confidence, entropy, maximum, log_sum
        grads = grad_margin, grad_loss, grad_confidence, grad_entropy
        target = torch.where(target == ignore_index, IGNORED, target)
        columns = weight.to(dtype or weight.dtype)
        total = result_dtype(columns.dtype)
        grad_input = input.new_empty(input.shape if of_input else (0, 0))
        grad_weight = columns.new_zeros(columns.shape if of_weight else (0, 0), dtype=total)
        grad_bias = columns.new_zeros(columns.shape[0], dtype=total)
        # The gradient of the logits lies beside them, so each has half of the room.
        room = (chunk_bytes or default_chunk_bytes(input)) // 2
        shape = tile_shape(input, columns, None, max(room, columns.dtype.itemsize))
        for rows, classes, logits in logit_tiles(input, columns, bias, columns.dtype, shape):
            local = torch.where(target[rows] == IGNORED, IGNORED, within(target[rows], classes))
            grad_logits = statistics.sample_statistics_gradient_op(
                logits,
                local,
                within(rival[rows], classes),
                *(value[rows] for value in saved),
                log_norm,
                *(None if grad is None else grad[rows] for grad in grads),
                IGNORED,
            )
            if of_input:
                if classes.start == 0:
                    of_rows = columns.new_zeros((len(logits), columns.shape[1]), dtype=total)
                _add_product(of_rows, grad_logits, columns[classes])
                if classes.stop == len(columns):
                    grad_input[rows] = of_rows
            if of_weight:
                _add_product(grad_weight[classes], grad_logits.t(), input[rows].to(columns.dtype))
            grad_bias[classes] += grad_logits.sum(0, dtype=total)
            del grad_logits  # or the next one would lie beside it
        bias_dtype = weight.dtype if bias is None else bias.dtype
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)

    @staticmethod
    def fake(
        input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *_, of_input, of_weight = others
        return (
            input.new_empty(input.shape if of_input else (0, 0)),
            weight.new_empty(weight.shape if of_weight else (0, 0)),
            weight.new_empty(weight.shape[:1]) if bias is None else bias.new_empty(bias.shape),
        )


linear_sample_statistics_gradient_op = LinearSampleStatisticsGradientOp()


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """In float32 also for products of half precision."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one.mm(other)
