"""Margins, scores, statistics and selections of a linear head that is spread over processes.

Every rank computes the :class:`RowSums` of its own classes. The ranks exchange these sums. Then
every rank merges them and computes the results of all rows.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from . import margin_pair as pairs
from . import row_sums, statistics
from .linear_gradient import (
    label_pair,
    linear_sample_statistics_gradient_op,
    margin_head_gradient,
)
from .linear_head import as_matrix, in_shape, norm_parameters, with_temperature
from .margin import RIVALS
from .margin_gradient import boundary_gradient, log_norm_gradient
from .row_sums import IGNORED, StatisticsFields
from .select import select_smallest_op
from .shard import Shard, open_shard, records_gradient, sums_over_ranks
from .tiles import CPU_CHUNK_BYTES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# How many bytes of rows of the weight the ranks exchange at most at once. All ranks need the same
# number.
_EXCHANGED_BYTES = CPU_CHUNK_BYTES


def _fields(
    shard: Shard,
    head: tuple[Tensor, Tensor, Tensor | None],
    target: Tensor,
    log_norm: Tensor | None,
    ignore_index: int,
    input_norm: Tensor | None = None,
) -> StatisticsFields:
    """The fields of ``sample_statistics_op``.

    Without ``input_norm`` only margin and rival are valid.
    """
    ignored = target == ignore_index
    label = torch.where(ignored, 0, target)
    rows = sums_over_ranks(shard, head, label, input_norm is not None)
    return row_sums.finish_exactly(rows, label, ignored, input_norm, log_norm)


def _scores(
    shard: Shard, input: Tensor, weight: Tensor, bias: Tensor | None, bias_in_norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores, the pairs of classes, and the distances of their rows of the weight."""
    label = input.new_zeros(len(input), dtype=torch.int64)
    rows = sums_over_ranks(shard, (input, weight, bias), label, False)
    pair, difference = row_sums.top_pair(rows)
    norm_weight, norm_bias = norm_parameters(weight, bias, bias_in_norm, shard.dtype)
    row_bytes = max(weight.shape[1], 1) * result_dtype(weight.dtype).itemsize
    parts = []
    for part in pair.split(max(_EXCHANGED_BYTES // (2 * row_bytes), 1)):
        classes = part.flatten()
        pair_weight = shard.rows(norm_weight, classes)
        pair_bias = None if norm_bias is None else shard.rows(norm_bias, classes)
        index = torch.arange(len(classes), device=classes.device).view(-1, 2)
        parts.append(pairs.pair_distance_op(pair_weight, pair_bias, index))
    distance = torch.where(rows.has_nan, torch.nan, torch.cat(parts))
    return pairs.boundary_distance(difference, distance), pair, distance


def _refuse_second_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make second derivatives raise an error.

    torch's ``once_differentiable`` would silently leave out the second derivatives of the weight.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "marginops: second derivatives are not implemented with group=; "
                "call backward() without create_graph=True"
            )
        return backward(ctx, *grads)

    return checked


class _Statistics(torch.autograd.Function):
    """Computes the fields of ``sample_statistics_op`` over a group."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        log_norm: Tensor | None,
        ignore_index: int,
        shard: Shard,
    ) -> tuple[Tensor, ...]:
        norm = torch.linalg.vector_norm(input, dim=1, dtype=result_dtype(input.dtype))
        fields = _fields(shard, (input, weight, bias), target, log_norm, ignore_index, norm)
        ctx.mark_non_differentiable(*(fields[index] for _, index in statistics.CONSTANTS))
        ctx.set_materialize_grads(False)
        ctx.ignore_index, ctx.shard = ignore_index, shard
        ctx.save_for_backward(
            input,
            weight,
            bias,
            target,
            log_norm,
            fields.margin if ctx.needs_input_grad[4] else None,
            fields.rival,
            fields.confidence,
            fields.entropy,
            fields.maximum,
            fields.log_sum,
        )
        return fields

    @staticmethod
    @_refuse_second_derivatives
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *head, target, log_norm, margin, rival, confidence, entropy, maximum, log_sum = (
            ctx.saved_tensors
        )
        shard, ignore_index = ctx.shard, ctx.ignore_index
        grad = StatisticsFields._make(grads)
        softmax_grads = grad.loss, grad.confidence, grad.entropy
        if grad.margin is not None and all(value is None for value in softmax_grads):
            value, pair = label_pair(grad.margin, target, rival, log_norm, ignore_index)
            gradients = margin_head_gradient(
                value, pair, tuple(head), shard.dtype, ctx.needs_input_grad, layout=shard
            )
        else:
            local = torch.where(target == ignore_index, IGNORED, shard.local(target))
            gradients = _dense_gradient(
                shard,
                head,
                ctx.needs_input_grad,
                local,
                shard.local(rival),
                *(confidence, entropy, maximum, log_sum, log_norm),
                *(grad.margin, *softmax_grads),
            )
        grad_log_norm = log_norm_gradient(grad.margin, margin, target, ignore_index)
        return *gradients, None, grad_log_norm, None, None


def _dense_gradient(
    shard: Shard, head: Sequence[Any], needs_grad: Sequence[bool], *statistics: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of all statistics in input, weight and bias of this rank.

    ``statistics`` are arguments of ``linear_sample_statistics_gradient_op``.
    """
    input, weight, bias = head
    if len(weight):
        grad_input, grad_weight, grad_bias = linear_sample_statistics_gradient_op(
            *head, *statistics, IGNORED, shard.dtype, shard.chunk_bytes, *needs_grad[:2]
        )
    else:
        grad_input, grad_weight = torch.zeros_like(input), torch.zeros_like(weight)
        grad_bias = weight.new_zeros(0)
    return (
        shard.sum(grad_input) if needs_grad[0] else None,
        grad_weight if needs_grad[1] else None,
        grad_bias if bias is not None else None,
    )


class _Margin(torch.autograd.Function):
    """Attaches a backward pass for the head to margins that are computed already."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_norm: Tensor | None,
        margin: Tensor,
        target: Tensor,
        rival: Tensor,
        ignore_index: int,
        shard: Shard,
    ) -> Tensor:
        ctx.ignore_index, ctx.shard = ignore_index, shard
        margin_or_none = margin if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(input, weight, bias, log_norm, margin_or_none, target, rival)
        return margin.clone()

    @staticmethod
    @_refuse_second_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *head, log_norm, margin, target, rival = ctx.saved_tensors
        value, pair = label_pair(grad, target, rival, log_norm, ctx.ignore_index)
        gradients = margin_head_gradient(
            value, pair, tuple(head), ctx.shard.dtype, ctx.needs_input_grad, layout=ctx.shard
        )
        grad_log_norm = log_norm_gradient(grad, margin, target, ctx.ignore_index)
        return *gradients, grad_log_norm, None, None, None, None, None


class _Score(torch.autograd.Function):
    """Attaches a backward pass for the head to scores that are computed already."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        score: Tensor,
        pair: Tensor,
        distance: Tensor,
        bias_in_norm: bool,
        shard: Shard,
    ) -> Tensor:
        ctx.bias_in_norm, ctx.shard = bias_in_norm, shard
        ctx.save_for_backward(input, weight, bias, score, pair, distance)
        return score.clone()

    @staticmethod
    @_refuse_second_derivatives
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *head, score, pair, distance = ctx.saved_tensors
        slope, distance_coefficient = boundary_gradient(grad, score, distance)
        gradients = margin_head_gradient(
            slope,
            pair,
            tuple(head),
            ctx.shard.dtype,
            ctx.needs_input_grad,
            distance_coefficient,
            ctx.bias_in_norm,
            ctx.shard,
        )
        return *gradients, None, None, None, None, None


def sample_statistics(
    head: tuple[Tensor, Tensor, Tensor | None],
    labels: tuple[Tensor, int],
    log_norm: Tensor | float | None,
    temperature: float,
    chunk_bytes: int | None,
    group: ProcessGroup,
) -> tuple[Tensor, ...]:
    """Compute the fields of ``linear_sample_statistics_op`` over a group."""
    function = "linear_sample_statistics"
    shard = _open(function, head, labels, log_norm, None, chunk_bytes, group, temperature)
    (input, weight, bias), (target, ignore_index) = head, labels
    log_norm = checks.as_log_norm(log_norm, input)
    head = with_temperature((as_matrix(input), weight, bias), temperature)
    fields: tuple[Tensor, ...] = _Statistics.apply(
        *head, target.flatten(), log_norm, ignore_index, shard
    )
    return fields


def classification_margin(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    log_norm: Tensor | float | None,
    ignore_index: int,
    chunk_bytes: int | None,
    group: ProcessGroup,
    k: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute ``linear_classification_margin`` over a group.

    With ``k`` the function returns the k smallest margins and their indices.
    """
    head, labels = (input, weight, bias), (target, ignore_index)
    shard = _open("linear_classification_margin", head, labels, log_norm, k, chunk_bytes, group)
    log_norm = checks.as_log_norm(log_norm, input)
    shape = target.shape
    input, target = as_matrix(input), target.flatten()
    with torch.no_grad():
        head = input, weight, bias
        margin, rival, *_ = _fields(shard, head, target, log_norm, ignore_index)
    margin, *chosen = _smallest(margin, k)
    if chosen:
        input, target, rival = (value[chosen[0]] for value in (input, target, rival))
    margin = _Margin.apply(
        input, weight, bias, log_norm, margin, target, rival, ignore_index, shard
    )
    return margin if chosen else in_shape(margin, shape), *chosen


def minimal_margin_score(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rival: Any,
    bias_in_norm: bool,
    chunk_bytes: int | None,
    group: ProcessGroup,
    k: int | None = None,
) -> tuple[Tensor, ...]:
    """Compute ``linear_minimal_margin_score`` over a group.

    With ``k`` the function returns the k smallest scores and their indices.
    """

    def check() -> dict[str, Any]:
        checks.check_bias_in_norm(bias, bias_in_norm)
        checks.check_choice("rival", rival, RIVALS)
        if rival == "nearest":
            raise ValueError('rival: expected "top2" with group, got "nearest"')
        return {"bias_in_norm": bool(bias_in_norm), "k": _checked_k(k, input)}

    head = input, weight, bias
    function = "linear_minimal_margin_score"
    shard = open_shard(function, head, chunk_bytes, group, check, or_more=k is None)
    shape, input = input.shape[:-1], as_matrix(input)
    with torch.no_grad():
        score, pair, distance = _scores(shard, input, weight, bias, bias_in_norm)
    score, *chosen = _smallest(score, k)
    if chosen:
        input, pair, distance = (value[chosen[0]] for value in (input, pair, distance))
    score = _Score.apply(input, weight, bias, score, pair, distance, bias_in_norm, shard)
    return score if chosen else in_shape(score, shape), *chosen


def _open(
    function: str,
    head: tuple[Any, Any, Any],
    labels: tuple[Any, Any],
    log_norm: Any,
    k: Any,
    chunk_bytes: Any,
    group: Any,
    temperature: Any = 1.0,
) -> Shard:
    """Check the arguments of a function with labels. ``labels`` is target and ignore_index."""
    target, ignore_index = labels

    def check() -> dict[str, Any]:
        checks.check_target(target, head[0], ignore_index, "input", dims=head[0].dim() - 1)
        checks.check_temperature(temperature)
        norm = checks.as_log_norm(log_norm, head[0])
        return {
            "ignore_index": ignore_index,
            "temperature": temperature,
            "log_norm (is not None, requires_grad)": [
                norm is not None,
                records_gradient(norm),
            ],
            "k": _checked_k(k, head[0]),
        }

    return open_shard(function, head, chunk_bytes, group, check, labels, or_more=k is None)


def _checked_k(k: Any, input: Tensor) -> int | None:
    return None if k is None else checks.check_k(k, len(input), "rows of input")


def _smallest(values: Tensor, k: Any) -> tuple[Tensor, ...]:
    """The k smallest values and their indices; without ``k`` all values and no indices."""
    return (values,) if k is None else select_smallest_op(values, operator.index(k))
