"""Margins and scores of a linear head, without the whole matrix of logits.

A ``linear_`` function computes what the function without this prefix computes from
``F.linear(input, weight, bias)``. PyTorch's matrix product writes the logits of a tile of rows and
classes into a buffer, and the op reads them there. The forward pass saves the pair of classes of
every sample. So the gradient needs no logits: it follows from the difference of two rows of the
weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import checked_target
from . import linear_sharded as sharded
from . import margin_pair as pairs
from . import row_sums
from ._library import Op
from .distributed_head import local_head
from .linear_gradient import label_pair, margin_head_gradient, saved_distance_op
from .linear_head import (
    Tensors,
    as_matrix,
    checked_linear,
    empty_results,
    head_sums,
    in_shape,
    join,
    norm_parameters,
)
from .margin import RIVALS, Rival
from .margin_gradient import boundary_gradient, log_norm_gradient
from .tiles import check_rows, logit_tiles, tile_shape

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
    """Signed margin of every sample from the features, without the [N, C] matrix of logits.

    The result equals ``classification_margin(F.linear(input, weight, bias), target, ...)``, the
    margin of Banburski et al. (2021), up to the rounding of the matrix product.

    Args:
        input: ``[N, D]`` or ``[..., N, D]``, the features before the last layer, float32, float64,
            bfloat16 or float16. If the rows do not follow each other in memory, they are copied.
        weight: ``[C, D]``, C >= 2, in the dtype of ``input``. Under autocast it may have any of
            these dtypes but float64. A transposed square weight cannot be seen.
            It may be a DTensor with ``Shard(0)`` on a mesh of one dimension, as tensor parallelism
            makes it. Then the group of the mesh counts as ``group``, ``bias`` is a DTensor of the
            same kind, and the gradients of both are DTensors. ``input`` and ``target`` may be
            replicated DTensors. If the ranks pass different samples, every rank raises an error.
        target: ``[N]`` or ``[..., N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]`` in the dtype of ``weight``.
        log_norm: Natural logarithm of the norm product, see
            :func:`marginops.classification_margin`.
        ignore_index: Samples with this target get ``+inf`` and no gradient.
        chunk_bytes: The size of the buffer for logits in bytes, at least one row of logits. The
            default is 16 MiB on the CPU and 128 MiB on CUDA. A much smaller buffer makes the
            product slower.
        group: The ``torch.distributed`` group whose processes share the head. Every rank passes
            the same ``input`` and ``target``, and its own rows of ``weight`` and ``bias``. The
            classes are numbered over all ranks, in the order of the ranks. All ranks have to run
            the same backward pass. Each rank gets the whole gradient of ``input`` and the gradient
            of its own rows. ``group`` does not work inside ``torch.compile``.

    Returns:
        In the shape of ``target``, float64 for float64 input, else float32, in units of the logits
        (divided by the norm product), the same on every rank of ``group``. The product is computed
        in the dtype of the arguments. Under autocast it is computed in the dtype of autocast, and
        ``weight`` is copied.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or the
            arguments of the ranks of ``group`` disagree. If one rank raises, all ranks raise.
        RuntimeError: A target is outside [0, C), on the CPU or with ``group``. On CUDA without
            ``group`` this is a device-side assertion.

    The margins are differentiable (once) in ``input``, ``weight``, ``bias`` and ``log_norm``. The
    gradient needs two rows of ``weight`` per sample and no logits; it takes O(N D + C D) time. The
    result is deterministic, because sums over samples have a fixed order. Beside the result the
    function needs O(N) memory and ``chunk_bytes``.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_classification_margin(features, weight, torch.tensor([1, 1]))
        tensor([ 1.0000, -1.5000])
    """
    if not checks.is_ordinary(weight):
        input, weight, bias, group, target = local_head(input, weight, bias, group, target)
    if group is not None:
        return sharded.classification_margin(
            input, weight, target, bias, log_norm, ignore_index, chunk_bytes, group
        )[0]
    dtype = checked_linear(input, weight, bias, chunk_bytes, or_more=True)
    checks.check_target(target, input, ignore_index, "input", dims=input.dim() - 1)
    log_norm = checks.as_log_norm(log_norm, input)
    margin: Tensor = linear_classification_margin_op(
        as_matrix(input), weight, bias, target.flatten(), log_norm, ignore_index, dtype, chunk_bytes
    )[0]
    return in_shape(margin, target.shape)


class LinearClassificationMarginOp(Op):
    """Computes margins and rivals of a linear head."""

    schema = (
        "linear_classification_margin(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
        " Tensor? log_norm, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
        " -> (Tensor, Tensor)"
    )
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
    if not checks.is_ordinary(weight):
        input, weight, bias, group, _ = local_head(input, weight, bias, group)
    if group is not None:
        return sharded.minimal_margin_score(
            input, weight, bias, rival, bias_in_norm, chunk_bytes, group
        )[0]
    checks.check_choice("rival", rival, RIVALS)
    checks.check_bias_in_norm(bias, bias_in_norm)
    dtype = checked_linear(input, weight, bias, chunk_bytes, or_more=True)
    score: Tensor = linear_minimal_margin_score_op(
        as_matrix(input), weight, bias, bias_in_norm, rival == "nearest", dtype, chunk_bytes
    )[0]
    return in_shape(score, input.shape[:-1])


class LinearMinimalMarginScoreOp(Op):
    """Computes scores of a linear head, the pairs of classes, and the distances of their rows."""

    schema = (
        "linear_minimal_margin_score(Tensor input, Tensor weight, Tensor? bias, bool bias_in_norm,"
        " bool nearest, ScalarType? dtype, int? chunk_bytes) -> (Tensor, Tensor, Tensor)"
    )
    constants = (("distance", 2),)
    row_arguments = ("input",)
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
        norm_weight, norm_bias = norm_parameters(weight, bias, bias_in_norm, dtype)
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
        ctx.save_for_backward(*tensors, score, pair, distance)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, bias, score, pair, distance = ctx.saved_tensors
        slope, distance_coefficient = boundary_gradient(
            grad, score, saved_distance_op(distance.detach(), weight, bias)
        )
        gradients = margin_head_gradient(
            slope,
            pair,
            (input, weight, bias),
            ctx.dtype,
            ctx.needs_input_grad,
            distance_coefficient,
            ctx.bias_in_norm,
        )
        return *gradients, None, None, None, None


linear_minimal_margin_score_op = LinearMinimalMarginScoreOp()
