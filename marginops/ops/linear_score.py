"""Minimal margin scores of a linear head, without the whole matrix of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import margin_pair as pairs
from .linear_arguments import checked_linear_head
from .linear_gradient import pair_gradients, saved_distance_op
from .linear_head import LinearHead, Tensors, join
from .linear_op import Gradients, LinearOp, empty_results
from .margin import Rival
from .margin_gradient import boundary_gradient
from .row_sums import top_pair
from .select import Selection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_minimal_margin_score(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The minimal margin score of every sample, from features and last layer, without logits.

    The result equals ``minimal_margin_score(F.linear(input, weight, bias), weight, bias, ...)``,
    the score of Weinstein et al. (2020), up to the rounding of the matrix product.

    Args:
        input: ``[N, D]`` or ``[..., N, D]``, see :func:`marginops.linear_classification_margin`.
        weight: ``[C, D]``, C >= 2, see :func:`marginops.linear_classification_margin`.
        bias: ``[C]``, part of the logits. It is part of the norm only with ``bias_in_norm``.
        rival: ``"top2"`` or ``"nearest"``, see :func:`marginops.minimal_margin_score`. With
            ``group`` only ``"top2"`` is available.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.
        chunk_bytes: The size of the buffer for logits, see
            :func:`marginops.linear_classification_margin`.
        group: The processes that share the head, see
            :func:`marginops.linear_classification_margin`.

    Returns:
        ``[N]`` or ``[..., N]``, float64 for float64 input, else float32, in units of the features.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or the
            arguments of the ranks of ``group`` disagree. If one rank raises, all ranks raise.

    The scores are differentiable (once) in ``input``, ``weight`` and ``bias``. The two classes of
    a score are constants. The gradient needs no logits and takes O(N D + C D) time. The result is
    deterministic. Beside the result the function needs O(N) memory, ``chunk_bytes``, and the
    memory of :func:`marginops.minimal_margin_score`.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_minimal_margin_score(features, weight)
        tensor([0.7071, 1.0607])
    """
    head = checked_linear_head(
        "linear_minimal_margin_score",
        (input, weight, bias),
        chunk_bytes,
        group,
        rival=rival,
        bias_in_norm=bias_in_norm,
    )
    return head.in_shape(linear_minimal_margin_score_op.call(head)[0])


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
    head = checked_linear_head(
        "linear_select_minimal_margin",
        (input, weight, bias),
        chunk_bytes,
        group,
        rival=rival,
        bias_in_norm=bias_in_norm,
        selects=True,
        k=k,
    )
    return Selection(*linear_minimal_margin_score_op.call(head)[:2])


class LinearMinimalMarginScoreOp(LinearOp):
    """Computes scores of a linear head, and the indices of those that ``k`` selects.

    The other results are the pairs of classes, and the distances of their rows of the weight.
    """

    schema = (
        "linear_minimal_margin_score(Tensor input, Tensor weight, Tensor? bias, SymInt? k,"
        " bool bias_in_norm, bool nearest, ScalarType? dtype, int? chunk_bytes)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    )
    constants = (("indices", 1), ("pair", 2), ("distance", 3))
    row_arguments = ("input",)

    @staticmethod
    def compute(head: LinearHead) -> Tensors:
        norm_weight, norm_bias = head.norm_parameters()
        if (tiles := head.tiles_of_whole_rows()) is None:
            label = head.input.new_zeros(len(head.input), dtype=torch.int64)
            sums = head.place.row_sums(head, label, False)
            pair, difference = top_pair(sums)
            distance = head.place.pair_distance(norm_weight, norm_bias, pair)
            distance = torch.where(sums.has_nan, torch.nan, distance)
            score = pairs.boundary_distance(difference, distance)
            return head.smallest(score, pair, distance)
        parts = []
        for _, _, logits in tiles:
            pair, distance = pairs.minimal_margin_pair_op(
                logits, norm_weight, norm_bias, None, head.nearest
            )
            first, second = logits.gather(1, pair).to(distance.dtype).unbind(1)
            parts.append((pairs.boundary_distance(first - second, distance), pair, distance))
        return head.smallest(*join(parts))

    @staticmethod
    def empty(head: LinearHead) -> Tensors:
        return empty_results(head, "value", "index", "pair", "value")

    @staticmethod
    def keep(results: Tensors, needs_grad: set[str]) -> Tensors:
        score, _, pair, distance = results
        return score, pair, distance

    @staticmethod
    def differentiate(head: LinearHead, kept: Any, grads: Any, needs_grad: set[str]) -> Gradients:
        score, pair, distance = kept
        distance = saved_distance_op(distance.detach(), head.weight, head.bias)
        slope, distance_coefficient = boundary_gradient(grads[0], score, distance)
        return pair_gradients(head, slope, pair, needs_grad, distance_coefficient)


linear_minimal_margin_score_op = LinearMinimalMarginScoreOp()
