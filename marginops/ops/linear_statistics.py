"""Sample statistics of a linear head, without the whole matrix of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import checked_target, result_dtype
from . import linear_sharded as sharded
from . import row_sums, statistics
from ._library import Op
from .distributed_head import local_head
from .linear_gradient import (
    label_pair,
    linear_sample_statistics_gradient_op,
    margin_head_gradient,
)
from .linear_head import (
    Tensors,
    as_matrix,
    checked_linear,
    head_sums,
    join,
    with_temperature,
)
from .margin_gradient import log_norm_gradient
from .row_sums import StatisticsFields
from .rows import RowLayout
from .statistics import SampleStatistics, as_statistics
from .tiles import check_rows, logit_tiles, tile_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_sample_statistics(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> SampleStatistics:
    """Margin, loss, confidence, entropy, EL2N and more of every sample, without logits.

    The result equals ``sample_statistics(F.linear(input, weight, bias), target, input=input,
    ...)`` up to the rounding of the matrix product. :func:`marginops.sample_statistics` describes
    the fields and names their papers.

    Args:
        input: ``[N, D]`` or ``[..., N, D]``, see :func:`marginops.linear_classification_margin`.
        weight: ``[C, D]``, C >= 2, see :func:`marginops.linear_classification_margin`.
        target: ``[N]`` or ``[..., N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]``.
        log_norm: Natural logarithm of the norm product, see
            :func:`marginops.classification_margin`.
        ignore_index: Samples with this target have the values of a perfectly learnt sample and no
            gradient, see :func:`marginops.sample_statistics`.
        chunk_bytes: The size of the buffer for logits, see
            :func:`marginops.linear_classification_margin`.
        group: The processes that share the head, see
            :func:`marginops.linear_classification_margin`.

    Returns:
        :class:`marginops.SampleStatistics` of tensors in the shape of ``target``, with
        ``gradient_norm``. The floating-point fields are float64 for float64 input, else float32.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or the
            arguments of the ranks of ``group`` disagree. If one rank raises, all ranks raise.
        RuntimeError: A target is outside [0, C), on the CPU or with ``group``. On CUDA without
            ``group`` this is a device-side assertion.

    ``margin``, ``loss``, ``confidence`` and ``entropy`` are differentiable (once) in ``input``,
    ``weight`` and ``bias``. The margin is also differentiable in ``log_norm``. The gradient of the
    margin alone needs no logits. The other gradients compute the logits again, tile by tile, in a
    buffer of ``chunk_bytes``. The result is deterministic. Beside the results the function needs
    O(N) memory and ``chunk_bytes``. In half precision the backward pass also needs the gradient of
    ``weight`` in float32.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_sample_statistics(features, weight, torch.tensor([1, 1])).loss
        tensor([0.3133, 1.7014])
    """
    labels = target, ignore_index
    return head_statistics((input, weight, bias), labels, log_norm, 1.0, chunk_bytes, group)


def head_statistics(
    head: tuple[Tensor, Tensor, Tensor | None],
    labels: tuple[Tensor, int],
    log_norm: Tensor | float | None,
    temperature: float,
    chunk_bytes: int | None,
    group: ProcessGroup | None,
) -> SampleStatistics:
    """The statistics of the logits of a head divided by ``temperature``.

    ``head`` is input, weight and bias. ``labels`` is target and ``ignore_index``.
    """
    if not checks.is_ordinary(head[1]):
        *local, group, target = local_head(*head, group, labels[0])
        head, labels = (local[0], local[1], local[2]), (target, labels[1])
    if group is not None:
        fields = sharded.sample_statistics(head, labels, log_norm, temperature, chunk_bytes, group)
    else:
        (input, weight, bias), (target, ignore_index) = head, labels
        dtype = checked_linear(input, weight, bias, chunk_bytes, or_more=True)
        checks.check_target(target, input, ignore_index, "input", dims=input.dim() - 1)
        checks.check_temperature(temperature)
        log_norm = checks.as_log_norm(log_norm, input)
        input, weight, bias = with_temperature((as_matrix(input), weight, bias), temperature)
        fields = linear_sample_statistics_op(
            input, weight, bias, target.flatten(), log_norm, ignore_index, dtype, chunk_bytes
        )
    shape = labels[0].shape
    return as_statistics(fields, True, None if len(shape) == 1 else RowLayout(shape))


class LinearSampleStatisticsOp(Op):
    """Computes the statistics of a linear head. It returns :class:`StatisticsFields`."""

    schema = (
        "linear_sample_statistics(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
        " Tensor? log_norm, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
        f" -> {statistics.FIELDS}"
    )
    constants = statistics.CONSTANTS
    row_arguments = ("input", "target")
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
        check_rows(input, target=target)
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
                logits, target[rows], norm[rows], log_norm, ignore_index, False
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
        grad_margin, *softmax_grads, _ = grads
        grad_log_norm = log_norm_gradient(grad_margin, margin, target, ctx.ignore_index)
        if not any(ctx.needs_input_grad[:3]):
            gradients: tuple[Tensor | None, ...] = (None, None, None)
        elif all(value is None for value in softmax_grads) and grad_margin is not None:
            value, pair = label_pair(grad_margin, target, rival, log_norm, ctx.ignore_index)
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
                grad_margin,
                *softmax_grads,
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
