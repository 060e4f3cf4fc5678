"""Selection by margins and scores of a linear head, without the whole matrix of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks as checks
from . import linear_sharded as sharded
from ._library import Op
from .distributed_head import local_head
from .linear_gradient import (
    label_pair,
    margin_head_gradient,
    saved_distance_op,
    scatter_rows,
)
from .linear_head import Tensors, checked_linear, empty_results
from .linear_margin import LinearClassificationMarginOp, LinearMinimalMarginScoreOp
from .margin import RIVALS, Rival
from .margin_gradient import boundary_gradient, log_norm_gradient
from .select import Selection, select_smallest_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_select_minimal_margin(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Selection:
    """The k samples with the smallest minimal margin score, from features and last layer.

    The result equals ``select_smallest(linear_minimal_margin_score(input, weight, bias, ...), k)``.
    This is the batch selection of Weinstein et al. (2020).

    Args:
        input: ``[N, D]``, see :func:`marginops.linear_classification_margin` for the dtypes.
        weight: ``[C, D]``, C >= 2, see :func:`marginops.linear_classification_margin`.
        bias: ``[C]``, part of the logits. It is part of the norm only with ``bias_in_norm``.
        k: How many samples to select, 0 <= k <= N.
        rival: ``"top2"`` or ``"nearest"``, see :func:`marginops.linear_minimal_margin_score`.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.
        chunk_bytes: The size of the buffer for logits, see
            :func:`marginops.linear_classification_margin`.
        group: The processes that share the head, see
            :func:`marginops.linear_classification_margin`.

    Returns:
        :class:`marginops.Selection`: ``scores`` ``[k]``, float64 for float64 input, else float32,
        ascending and in units of the features; and ``indices`` ``[k]`` int64, rows of ``input``.
        Among equal scores the lowest index comes first. NaN comes last.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range, or
            the arguments of the ranks of ``group`` disagree. If one rank raises, all ranks raise.

    The selected scores are differentiable (once) in ``input``, ``weight`` and ``bias``. The
    backward pass works on the selected samples only. The result is deterministic. Beside the
    result the function needs O(N) memory, ``chunk_bytes``, and the memory of
    :func:`marginops.minimal_margin_score`.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_select_minimal_margin(features, weight, k=1)
        Selection(scores=tensor([0.7071]), indices=tensor([0]))
    """
    if not checks.is_ordinary(weight):
        input, weight, bias, group, _ = local_head(input, weight, bias, group)
    if group is not None:
        fields = sharded.minimal_margin_score(
            input, weight, bias, rival, bias_in_norm, chunk_bytes, group, k
        )
        return Selection(*fields)
    checks.check_choice("rival", rival, RIVALS)
    checks.check_bias_in_norm(bias, bias_in_norm)
    dtype = checked_linear(input, weight, bias, chunk_bytes)
    k = checks.check_k(k, input.size(0), "rows of input")
    fields = linear_select_minimal_margin_op(
        input, weight, bias, k, bias_in_norm, rival == "nearest", dtype, chunk_bytes
    )
    return Selection(*fields[:2])


class LinearSelectMinimalMarginOp(Op):
    """Computes the k smallest scores of a linear head, and their indices, pairs and distances."""

    schema = (
        "linear_select_minimal_margin(Tensor input, Tensor weight, Tensor? bias, SymInt k,"
        " bool bias_in_norm, bool nearest, ScalarType? dtype, int? chunk_bytes)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )
    constants = (("distance", 3),)
    has_kernels = False

    @staticmethod
    def reference(
        input: Tensor, weight: Tensor, bias: Tensor | None, k: int, *options: Any
    ) -> Tensors:
        score, pair, distance = LinearMinimalMarginScoreOp.reference(input, weight, bias, *options)
        scores, indices = select_smallest_op(score, k)
        return scores, indices, pair[indices], distance[indices]

    @staticmethod
    def fake(input: Tensor, weight: Tensor, bias: Tensor | None, k: int, *_: Any) -> Tensors:
        return empty_results(input, k, "value", "class", "pair", "value")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, _, ctx.bias_in_norm, _, ctx.dtype, _ = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, scores, indices, pair, distance = ctx.saved_tensors
        slope, distance_coefficient = boundary_gradient(
            grad, scores, saved_distance_op(distance.detach(), weight, bias)
        )
        grad_input, *gradients = margin_head_gradient(
            slope,
            pair,
            (input[indices], weight, bias),
            ctx.dtype,
            ctx.needs_input_grad,
            distance_coefficient,
            ctx.bias_in_norm,
        )
        grad_input = scatter_rows(grad_input, indices, input.shape[0])
        return grad_input, *gradients, None, None, None, None, None


linear_select_minimal_margin_op = LinearSelectMinimalMarginOp()


def linear_select_classification_margin(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Selection:
    """The k samples with the smallest classification margin, without logits.

    The result equals ``select_smallest(linear_classification_margin(input, weight, target, ...),
    k)``. Banburski et al. (2021) reduce the training set to the samples with the smallest margins.

    Args:
        input: ``[N, D]``, see :func:`marginops.linear_classification_margin` for the dtypes.
        weight: ``[C, D]``, C >= 2, see :func:`marginops.linear_classification_margin`.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]``.
        k: How many samples to select, 0 <= k <= N.
        log_norm: Natural logarithm of the norm product, see
            :func:`marginops.classification_margin`.
        ignore_index: Samples with this target get ``+inf`` and no gradient.
        chunk_bytes: The size of the buffer for logits, see
            :func:`marginops.linear_classification_margin`.
        group: The processes that share the head, see
            :func:`marginops.linear_classification_margin`.

    Returns:
        :class:`marginops.Selection`: ``scores`` ``[k]``, float64 for float64 input, else float32,
        ascending and in units of the logits (divided by the norm product); and ``indices`` ``[k]``
        int64, rows of ``input``. Among equal scores the lowest index comes first. ``+inf`` comes
        after all finite scores, and NaN comes last.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range, or
            the arguments of the ranks of ``group`` disagree. If one rank raises, all ranks raise.
        RuntimeError: A target is outside [0, C), on the CPU or with ``group``. On CUDA without
            ``group`` this is a device-side assertion.

    The selected scores are differentiable (once) in ``input``, ``weight``, ``bias`` and
    ``log_norm``. The backward pass works on the selected samples only. The result is
    deterministic. Beside the result the function needs O(N) memory and ``chunk_bytes``.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> target = torch.tensor([1, 1])
        >>> marginops.linear_select_classification_margin(features, weight, target, k=1)
        Selection(scores=tensor([-1.5000]), indices=tensor([1]))
    """
    if not checks.is_ordinary(weight):
        input, weight, bias, group, target = local_head(input, weight, bias, group, target)
    if group is not None:
        fields = sharded.classification_margin(
            input, weight, target, bias, log_norm, ignore_index, chunk_bytes, group, k
        )
        return Selection(*fields)
    dtype = checked_linear(input, weight, bias, chunk_bytes)
    checks.check_target(target, input, ignore_index, "input")
    k = checks.check_k(k, input.size(0), "rows of input")
    log_norm = checks.as_log_norm(log_norm, input)
    fields = linear_select_classification_margin_op(
        input, weight, bias, target, log_norm, k, ignore_index, dtype, chunk_bytes
    )
    return Selection(*fields[:2])


class LinearSelectClassificationMarginOp(Op):
    """Computes the k smallest margins of a linear head, and their indices and rivals."""

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
        *options: Any,
    ) -> Tensors:
        margin, rival = LinearClassificationMarginOp.reference(
            input, weight, bias, target, log_norm, *options
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
        return empty_results(input, k, "value", "class", "class")

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
        grad_input = scatter_rows(grad_input, indices, input.shape[0])
        grad_log_norm = log_norm_gradient(grad, scores, target, ctx.ignore_index)
        return grad_input, *gradients, None, grad_log_norm, None, None, None, None


linear_select_classification_margin_op = LinearSelectClassificationMarginOp()
