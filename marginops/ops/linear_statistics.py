"""Sample statistics of a linear head, without the whole matrix of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import result_dtype
from . import statistics
from .linear_arguments import checked_linear_head
from .linear_gradient import margin_gradients
from .linear_head import LinearHead, Tensors, join
from .linear_op import Gradients, Kept, LinearOp
from .linear_statistics_gradient import linear_sample_statistics_gradient_op
from .margin_gradient import log_norm_gradient
from .row_sums import IGNORED, StatisticsFields
from .rows import RowLayout
from .statistics import SampleStatistics, as_statistics
from .tiles import check_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PARAMETERS = ("input", "weight", "bias")


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
    head = checked_linear_head(
        "linear_sample_statistics",
        (input, weight, bias),
        chunk_bytes,
        group,
        labels=(target, ignore_index),
        log_norm=log_norm,
    )
    return head_statistics(head)


def head_statistics(head: LinearHead) -> SampleStatistics:
    """The statistics in the shape of the rows that the caller passed."""
    fields = linear_sample_statistics_op.call(head)
    return as_statistics(fields, True, None if len(head.shape) == 1 else RowLayout(head.shape))


class LinearSampleStatisticsOp(LinearOp):
    """Computes the statistics of a linear head. It returns :class:`StatisticsFields`."""

    schema = (
        "linear_sample_statistics(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
        " Tensor? log_norm, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
        f" -> {statistics.FIELDS}"
    )
    constants = statistics.CONSTANTS
    row_arguments = ("input", "target")

    @staticmethod
    def compute(head: LinearHead) -> Tensors:
        check_rows(head.input, target=head.target)
        dtype = result_dtype(head.input.dtype)
        norms = [
            torch.linalg.vector_norm(part, dim=1, dtype=dtype)
            for part in head.input.split(max(head.tile_shape()[0], 1))
        ]
        norm = torch.cat(norms)
        if (tiles := head.tiles_of_whole_rows()) is None:
            return head.statistics(norm)
        parts = [
            statistics.sample_statistics_op(
                logits, head.target[rows], norm[rows], head.log_norm, head.ignore_index, False
            )
            for rows, _, logits in tiles
        ]
        return join(parts)

    @staticmethod
    def empty(head: LinearHead) -> Tensors:
        return statistics.empty_fields(head.input, head.input.shape[0], True)

    @staticmethod
    def keep(results: Tensors, needs_grad: set[str]) -> Kept:
        fields = StatisticsFields._make(results)
        saved = fields.rival, fields.confidence, fields.entropy, fields.maximum, fields.log_sum
        return *saved, fields.margin if "log_norm" in needs_grad else None

    @staticmethod
    def differentiate(head: LinearHead, kept: Any, grads: Any, needs_grad: set[str]) -> Gradients:
        rival, *saved, margin = kept
        grad_margin, *softmax_grads, _ = grads
        gradients: Gradients = {}
        if grad_margin is not None and all(value is None for value in softmax_grads):
            gradients = margin_gradients(head, grad_margin, rival, needs_grad)
        elif not needs_grad.isdisjoint(_PARAMETERS):
            place = head.place
            values = linear_sample_statistics_gradient_op(
                *head[:3],
                torch.where(head.ignored, IGNORED, place.local(head.target)),
                place.local(rival),
                *saved,
                head.log_norm,
                grad_margin,
                *softmax_grads,
                head.dtype,
                head.chunk_bytes,
                "input" in needs_grad,
                "weight" in needs_grad,
            )
            gradients.update(zip(_PARAMETERS, values, strict=True))
            if "input" in needs_grad:
                gradients["input"] = place.sum(values[0])
        gradients["log_norm"] = log_norm_gradient(
            grad_margin, margin, head.target, head.ignore_index
        )
        return gradients


linear_sample_statistics_op = LinearSampleStatisticsOp()
