"""Selection of the k smallest scores."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from ._library import Op
from .arguments import check_k
from .margin_gradient import write


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
        return Selection(*select_smallest_op(scores, check_k(k, scores.size(0), "scores")))
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
    return check_k(k, count - skip, f"{counted} after skip" if skip else counted)


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
