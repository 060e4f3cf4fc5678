"""Margins and scores of a linear head whose logits never exist.

Each function equals that without ``linear_`` on ``F.linear(input, weight, bias)``. The vendor's
matrix product computes the logits of a tile of rows and classes at a time, in one buffer, where the
op reads them. The forward pass keeps the pair of classes of every sample, so the gradient needs no
logits: it is that of the difference of two rows of the weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import checked_target
from . import linear_sharded as sharded
from . import margin_pair as pairs
from . import row_sums
from ._library import Op
from .linear_gradient import label_pair, margin_head_gradient, once
from .linear_head import Tensors, checked_head, empty_results, head_sums, in_norm, join
from .margin import Rival
from .margin_gradient import boundary_gradient, log_norm_gradient
from .tiles import logit_tiles, tile_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_classification_margin(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Signed margin of every sample from the features: the [N, C] logits never exist.

    Equal to ``classification_margin(F.linear(input, weight, bias), target, ...)``, the margin of
    Banburski et al. (2021), up to the rounding of the matrix product.

    Args:
        input: ``[N, D]``, the features before the last layer, float32, float64, bfloat16 or
            float16.
        weight: ``[C, D]``, C >= 2, in the dtype of ``input``; under autocast in any but float64.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]`` in the dtype of ``weight``.
        log_norm: Logarithm of the norm product, see :func:`classification_margin`.
        ignore_index: Samples with this target get ``+inf`` and no gradient.
        chunk_bytes: Room for logits, at least one row of them; by default 16 MiB on the CPU
            and 128 MiB on CUDA. Much less makes the product slower.
        group: The ``torch.distributed`` group over which the classes are spread: every rank
            passes the same ``input`` and ``target``, and its own rows of ``weight`` and ``bias``
            in the order of ranks. Targets count all classes. All ranks have to run the same
            backward pass: each gets the whole gradient of ``input``, and that of its own rows.
            Not inside ``torch.compile``.

    Returns:
        ``[N]``, float64 for float64 input, else float32, the same on every rank of ``group``. The
        product is in the dtype of the arguments, or under autocast in that of autocast, for which
        ``weight`` is copied.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or ranks
            of ``group`` disagree; then every rank raises.
        RuntimeError: A target is outside [0, C) (CPU); on CUDA a device-side assertion.

    Differentiable (once) in ``input``, ``weight``, ``bias`` and ``log_norm``; the gradient needs
    no logits, only two rows of ``weight`` a sample, O(N D + C D). Deterministic: sums over
    samples have a fixed order. Beside the result O(N) and ``chunk_bytes``.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_classification_margin(features, weight, torch.tensor([1, 1]))
        tensor([ 1.0000, -1.5000])
    """
    if group is not None:
        return sharded.classification_margin(
            input, weight, target, bias, log_norm, ignore_index, chunk_bytes, group
        )[0]
    dtype = checked_head(input, weight, bias, chunk_bytes)
    checks.check_target(target, input, ignore_index, "input")
    log_norm = checks.as_log_norm(log_norm, input)
    margin: Tensor = linear_classification_margin_op(
        input, weight, bias, target, log_norm, ignore_index, dtype, chunk_bytes
    )[0]
    return margin


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
        return empty_results(input, input.shape[0], "value", "class")

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
    """Distance of every sample's features to its closest decision boundary, without logits.

    Equal to ``minimal_margin_score(F.linear(input, weight, bias), weight, bias, ...)``, the score
    of Weinstein et al. (2020), up to the rounding of the matrix product.

    Args:
        input: ``[N, D]``, see :func:`linear_classification_margin`.
        weight: ``[C, D]``, C >= 2.
        bias: ``[C]``; part of the logits, and of the norm only with ``bias_in_norm``.
        rival: ``"top2"`` or ``"nearest"``, see :func:`minimal_margin_score`; with ``group`` only
            ``"top2"``.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.
        chunk_bytes: Room for logits, see :func:`linear_classification_margin`.
        group: The processes over which the classes are spread, see
            :func:`linear_classification_margin`.

    Returns:
        ``[N]``, float64 for float64 input, else float32, in units of the features.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or ranks
            of ``group`` disagree; then every rank raises.

    Differentiable (once) in ``input``, ``weight`` and ``bias``, classes are constants; the
    gradient needs no logits, O(N D + C D). Deterministic. Beside the result O(N) and
    ``chunk_bytes``, and what :func:`minimal_margin_score` needs.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_minimal_margin_score(features, weight)
        tensor([0.7071, 1.0607])
    """
    if group is not None:
        return sharded.minimal_margin_score(
            input, weight, bias, rival, bias_in_norm, chunk_bytes, group
        )[0]
    checks.check_choice("rival", rival, get_args(Rival))
    checks.check_bias_in_norm(bias, bias_in_norm)
    dtype = checked_head(input, weight, bias, chunk_bytes)
    score: Tensor = linear_minimal_margin_score_op(
        input, weight, bias, bias_in_norm, rival == "nearest", dtype, chunk_bytes
    )[0]
    return score


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
        return empty_results(input, input.shape[0], "value", "pair", "value")

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
