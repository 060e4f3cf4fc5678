"""Selection of the samples with the smallest margins or minimal margin scores, in one call."""

from typing import Any

import torch
from torch import Tensor

from .._checks import result_dtype
from ._library import Op
from .arguments import as_log_norm, check_k, check_labelled_logits, warn_of_probabilities
from .margin import Rival, checked_head, classification_margin_op, minimal_margin_score_op
from .margin_gradient import margin_gradient, score_gradient
from .select import Selection, SelectSmallestOp
from .top2_margin import top2_margin_gradient


def _empty_selection(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return (
        logits.new_empty((k,), dtype=result_dtype(logits.dtype)),
        logits.new_empty((k,), dtype=torch.int64),
    )


def select_minimal_margin(
    logits: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    k: int,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
    softmax: bool = False,
) -> Selection:
    """The k samples with the smallest minimal margin score: score and selection in one call.

    The result equals ``select_smallest(minimal_margin_score(logits, weight, bias, ...), k)``. With
    a weight, the logits of B candidates and k = B / 10, this is the batch selection of Weinstein
    et al. (2020). With ``softmax`` it is the margin sampling of Scheffer et al. (2001).

    Args:
        logits: ``[N, C]``, C >= 2, float32, float64, bfloat16 or float16, any strides.
        weight: ``[C, D]`` or None, see :func:`marginops.minimal_margin_score`.
        bias: ``[C]`` in the dtype of ``weight``; read only with ``bias_in_norm``.
        k: How many samples to select, 0 <= k <= N.
        rival: ``"top2"`` or ``"nearest"``, see :func:`marginops.minimal_margin_score`.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.
        softmax: Compare probabilities instead of logits. Only without a weight.

    Returns:
        :class:`marginops.Selection`: ``scores`` ``[k]``, float64 for float64 logits, else float32,
        ascending and in units of the features, without a weight in units of the logits, or with
        ``softmax`` in [0, 1]; and ``indices`` ``[k]`` int64, rows of ``logits``. Among equal
        scores the lowest index comes first. NaN comes last.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range, or
            does not go with another one, see :func:`marginops.minimal_margin_score`.

    The selected scores are differentiable in ``logits``, ``weight`` and, with ``bias_in_norm``,
    ``bias``. The result is deterministic. The op reads the logits once. On the CPU it leaves out
    distances of rows of ``weight`` where a bound shows that the sample cannot be among the k. The
    op needs O(N) memory and at most 1 MiB more.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5], [0.1, 0.0], [3.0, 2.0]])
        >>> marginops.select_minimal_margin(logits, k=2).indices
        tensor([1, 2])
        >>> marginops.select_minimal_margin(logits, torch.eye(2), k=2).indices
        tensor([1, 2])
    """
    bias, nearest = checked_head(logits, weight, bias, rival, bias_in_norm, softmax)
    k = check_k(k, logits.size(0), "rows of logits")
    if weight is not None:
        warn_of_probabilities(logits)
    return Selection(*select_minimal_margin_op(logits, weight, bias, k, nearest, softmax))


class SelectMinimalMarginOp(Op):
    """The op behind :func:`marginops.select_minimal_margin`.

    The other arguments are those of :class:`marginops.ops.margin.MinimalMarginScoreOp`.
    """

    schema = (
        "select_minimal_margin(Tensor logits, Tensor? weight, Tensor? bias, SymInt k,"
        " bool nearest, bool softmax) -> (Tensor, Tensor)"
    )

    @staticmethod
    def reference(
        logits: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        k: int,
        nearest: bool,
        softmax: bool,
    ) -> tuple[Tensor, Tensor]:
        scores = minimal_margin_score_op.reference(logits, weight, bias, nearest, softmax)
        return SelectSmallestOp.reference(scores, k)

    @staticmethod
    def fake(
        logits: Tensor, weight: Tensor | None, bias: Tensor | None, k: int, *_: Any
    ) -> tuple[Tensor, Tensor]:
        return _empty_selection(logits, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, _, ctx.nearest, ctx.softmax = inputs
        needs_scores = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(*tensors, output[0] if needs_scores else None, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight, bias, scores, indices = ctx.saved_tensors
        if weight is None:
            gradient = top2_margin_gradient(grad, logits, indices, ctx.softmax)
            return gradient, None, None, None, None, None
        gradients = score_gradient(
            grad, scores, (logits, weight, bias), indices, ctx.nearest, ctx.needs_input_grad[:3]
        )
        return *gradients, None, None, None


select_minimal_margin_op = SelectMinimalMarginOp()


def select_classification_margin(
    logits: Tensor,
    target: Tensor,
    k: int,
    *,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Selection:
    """The k samples with the smallest classification margin: margin and selection in one call.

    The result equals ``select_smallest(classification_margin(logits, target, ...), k)``. Banburski
    et al. (2021) reduce the training set to the samples with the smallest margins.

    Args:
        logits: ``[N, C]``, C >= 2, float32, float64, bfloat16 or float16, any strides.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        k: How many samples to select, 0 <= k <= N.
        log_norm: Natural logarithm of the norm product, see
            :func:`marginops.classification_margin`.
        ignore_index: Samples with this target get ``+inf`` and no gradient.

    Returns:
        :class:`marginops.Selection`: ``scores`` ``[k]``, float64 for float64 logits, else float32,
        ascending and in units of the logits (divided by the norm product); and ``indices`` ``[k]``
        int64, rows of ``logits``. Among equal scores the lowest index comes first. ``+inf`` comes
        after all finite scores, and NaN comes last.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range.
        RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
            assertion.

    The selected scores are differentiable in ``logits`` and ``log_norm``. The result is
    deterministic. The op reads the logits once and needs O(N) memory.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5], [0.1, 0.0], [3.0, 2.0]])
        >>> marginops.select_classification_margin(logits, torch.tensor([0, 1, 0]), k=1)
        Selection(scores=tensor([-0.1000]), indices=tensor([1]))
    """
    check_labelled_logits(logits, target, ignore_index)
    k = check_k(k, logits.size(0), "rows of logits")
    log_norm = as_log_norm(log_norm, logits)
    return Selection(*select_classification_margin_op(logits, target, log_norm, k, ignore_index))


class SelectClassificationMarginOp(Op):
    """The op behind :func:`marginops.select_classification_margin`."""

    schema = (
        "select_classification_margin(Tensor logits, Tensor target, Tensor? log_norm, SymInt k,"
        " int ignore_index) -> (Tensor, Tensor)"
    )

    @staticmethod
    def reference(
        logits: Tensor, target: Tensor, log_norm: Tensor | None, k: int, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        margins = classification_margin_op.reference(logits, target, log_norm, ignore_index)
        return SelectSmallestOp.reference(margins, k)

    @staticmethod
    def fake(
        logits: Tensor, target: Tensor, log_norm: Tensor | None, k: int, *_: Any
    ) -> tuple[Tensor, Tensor]:
        return _empty_selection(logits, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, _, ctx.ignore_index = inputs
        scores = output[0] if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(*tensors, scores, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, scores, indices = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_logits, grad_log_norm = margin_gradient(
            grad, scores, tuple(inputs), indices, ctx.ignore_index, needs_grad
        )
        return grad_logits, None, grad_log_norm, None, None


select_classification_margin_op = SelectClassificationMarginOp()
