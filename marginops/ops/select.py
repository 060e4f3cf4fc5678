"""Selection of the k smallest scores: of given scores, of margins, and of minimal margin scores."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from ._library import Op
from .margin import Rival, checked_head, classification_margin_op, minimal_margin_score_op
from .margin_gradient import margin_gradient, score_gradient, write
from .top2_margin import top2_margin_gradient


class Selection(NamedTuple):
    """The k smallest scores in ascending order, and the indices of their samples."""

    scores: Tensor
    indices: Tensor

    def complement(self, count: int) -> Tensor:
        """The indices of the samples that are not selected, in ascending order.

        Args:
            count: The number N of samples that the selection was made from.

        Returns:
            ``[N - k]`` int64. The method does not wait for the device.

        Raises:
            ValueError: ``count`` is less than the number of selected samples.
            RuntimeError: A selected index is not below ``count``, on the CPU. On CUDA this is a
                device-side assertion.

        Example:
            >>> marginops.select_smallest(torch.tensor([3.0, 1.0, 2.0]), k=1).complement(3)
            tensor([0, 2])
        """
        checks.check_int("count", count)
        k = self.indices.shape[0]
        if count < k:
            raise ValueError(f"count: expected at least {k} (the number selected), got {count}")
        rest = self.indices.new_ones(count, dtype=torch.bool).scatter(0, self.indices, False)
        return torch.nonzero_static(rest, size=count - k).squeeze(1)


def select_smallest(
    scores: Tensor, k: int, *, mask: Tensor | None = None, skip: int = 0
) -> Selection:
    """The k smallest scores in ascending order, with a fixed order among ties.

    The result equals the first k elements of ``torch.sort(scores, stable=True)`` bit for bit, on
    every device and in every run: ``-0.0`` equals ``+0.0``, ``+inf`` comes before NaN, NaN of
    either sign comes last and counts as one value, and among equal values the lowest index comes
    first.

    Args:
        scores: ``[N]``, float32, float64, bfloat16 or float16, any stride.
        k: How many scores to select, 0 <= k <= N.
        mask: ``[N]`` bool, True where a score may be selected. By default all may.
        skip: How many of the smallest scores to leave out. The function selects the k that follow
            them.

    Returns:
        :class:`marginops.Selection`: ``scores`` ``[k]`` in the dtype of the input, and ``indices``
        ``[k]`` int64. :meth:`marginops.Selection.complement` has the indices of the others.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or range, or fewer than
            ``skip + k`` scores may be selected.

    The selected scores are differentiable in ``scores``. The result is deterministic. The op
    takes O(N + k log k) time, for a radix select and a sort of the selected scores, and needs O(N)
    memory. With ``mask`` the function copies the scores that may be selected, and waits for the
    device.

    Example:
        >>> scores = torch.tensor([3.0, 1.0, 2.0, 1.0])
        >>> marginops.select_smallest(scores, k=3)
        Selection(scores=tensor([1., 1., 2.]), indices=tensor([1, 3, 2]))
        >>> mask = torch.tensor([True, False, True, True])
        >>> marginops.select_smallest(scores, k=1, mask=mask, skip=1)
        Selection(scores=tensor([2.]), indices=tensor([2]))
    """
    checks.check_tensor("scores", scores, 1, "[N]")
    if mask is None and type(skip) is int and skip == 0:
        return Selection(*select_smallest_op(scores, checks.check_k(k, scores.size(0), "scores")))
    rows = None if mask is None else allowed_rows(mask, scores)
    allowed = scores if rows is None else scores[rows]
    counted = "scores" if mask is None else "scores that mask allows"
    k = check_k_after_skip(k, skip, allowed.shape[0], counted)
    values, indices = select_smallest_op(allowed, skip + k)
    indices = indices[skip:]
    return Selection(values[skip:], indices if rows is None else rows[indices])


def allowed_rows(mask: Any, scores: Tensor) -> Tensor:
    """The rows of scores ``[N]`` that a mask allows, in ascending order."""
    expected = f"mask: expected a bool tensor of shape {[*scores.shape]} as scores"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{expected}, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{expected}, got {mask.dtype}; pass a comparison such as mask != 0")
    if mask.shape != scores.shape:
        raise ValueError(f"{expected}, got {[*mask.shape]}")
    checks.check_device("mask", mask, scores, "scores")
    return mask.nonzero().squeeze(1)


def check_k_after_skip(k: Any, skip: Any, count: int, counted: str) -> int:
    """Check that ``skip`` and then k of ``count`` samples can be taken; returns k."""
    checks.check_int("skip", skip, 0)
    if skip > count:
        raise ValueError(f"skip: expected at most {count} (the number of {counted}), got {skip}")
    return checks.check_k(k, count - skip, f"{counted} after skip" if skip else counted)


class SelectSmallestOp(Op):
    """The op behind :func:`marginops.select_smallest`."""

    schema = "select_smallest(Tensor scores, SymInt k) -> (Tensor, Tensor)"

    @staticmethod
    def reference(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        torch._check(
            0 <= k <= scores.shape[0], lambda: f"k: expected at most {len(scores)}, got {k}"
        )
        # torch.sort may not put a NaN with a sign bit last. So all NaN become the same NaN, and
        # -0.0 becomes +0.0.
        order = torch.where(scores.isnan(), torch.nan, scores + 0).sort(stable=True).indices[:k]
        return scores[order], order.clone()

    @staticmethod
    def fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return scores.new_empty((k,)), scores.new_empty((k,), dtype=torch.int64)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.count = inputs[0].shape[0]
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return write("scatter_", grad.new_zeros(ctx.count), 0, indices, grad), None


select_smallest_op = SelectSmallestOp()


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
    k = checks.check_k(k, logits.size(0), "rows of logits")
    if weight is not None:
        checks.warn_of_probabilities(logits)
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
    checks.check_labelled_logits(logits, target, ignore_index)
    k = checks.check_k(k, logits.size(0), "rows of logits")
    log_norm = checks.as_log_norm(log_norm, logits)
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
