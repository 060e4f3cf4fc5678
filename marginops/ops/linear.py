"""Margins, scores, statistics and selections of a linear head whose logits never exist.

Each equals the op of the same name without ``linear_`` on ``F.linear(input, weight, bias)``. The
logits are computed by the vendor's matrix product, a tile of rows and classes at a time in one
buffer, and read while they are there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from torch import Tensor

from .. import _checks as checks
from . import linear_sharded as sharded
from .linear_margin import (
    linear_classification_margin_op,
    linear_minimal_margin_score_op,
    linear_select_classification_margin_op,
    linear_select_minimal_margin_op,
)
from .linear_statistics import linear_sample_statistics_op
from .margin import Rival
from .select import Selection
from .statistics import SampleStatistics, as_statistics
from .tiles import check_chunk_bytes

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
    dtype = _checked(input, weight, bias, chunk_bytes)
    checks.check_target(target, input, ignore_index, "input")
    log_norm = checks.as_log_norm(log_norm, input)
    margin: Tensor = linear_classification_margin_op(
        input, weight, bias, target, log_norm, ignore_index, dtype, chunk_bytes
    )[0]
    return margin


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
    dtype = _checked(input, weight, bias, chunk_bytes)
    score: Tensor = linear_minimal_margin_score_op(
        input, weight, bias, bias_in_norm, rival == "nearest", dtype, chunk_bytes
    )[0]
    return score


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

    Equal to ``sample_statistics(F.linear(input, weight, bias), target, input=input, ...)`` up to
    the rounding of the matrix product; see there for the fields and their papers.

    Args:
        input: ``[N, D]``, see :func:`linear_classification_margin`.
        weight: ``[C, D]``, C >= 2.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]``.
        log_norm: Logarithm of the norm product, see :func:`classification_margin`.
        ignore_index: Samples with this target are reported as learnt perfectly, see
            :func:`sample_statistics`.
        chunk_bytes: Room for logits, see :func:`linear_classification_margin`.
        group: The processes over which the classes are spread, see
            :func:`linear_classification_margin`.

    Returns:
        :class:`SampleStatistics` of ``[N]`` tensors, ``gradient_norm`` among them.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device, or ranks
            of ``group`` disagree; then every rank raises.
        RuntimeError: A target is outside [0, C) (CPU); on CUDA a device-side assertion.

    ``margin``, ``loss``, ``confidence`` and ``entropy`` are differentiable (once) in ``input``,
    ``weight`` and ``bias``, the margin also in ``log_norm``. The gradient of the margin alone
    needs no logits; that of the others computes them again, tile by tile, in the same room.
    Deterministic. Beside the results O(N) and ``chunk_bytes``, and backward in half precision the
    sums of the gradient of ``weight`` in float32.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_sample_statistics(features, weight, torch.tensor([1, 1])).loss
        tensor([0.3133, 1.7014])
    """
    if group is not None:
        fields = sharded.sample_statistics(
            input, weight, target, bias, log_norm, ignore_index, chunk_bytes, group
        )
        return as_statistics(fields, True)
    dtype = _checked(input, weight, bias, chunk_bytes)
    checks.check_target(target, input, ignore_index, "input")
    log_norm = checks.as_log_norm(log_norm, input)
    fields = linear_sample_statistics_op(
        input, weight, bias, target, log_norm, ignore_index, dtype, chunk_bytes
    )
    return as_statistics(fields, True)


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
    """The k samples closest to a decision boundary, from their features.

    Equal to ``select_smallest(linear_minimal_margin_score(input, weight, bias, ...), k)``: the
    batch selection of Weinstein et al. (2020) without logits.

    Args:
        input: ``[N, D]``, see :func:`linear_classification_margin`.
        weight: ``[C, D]``, C >= 2.
        bias: ``[C]``; part of the logits, and of the norm only with ``bias_in_norm``.
        k: How many, 0 <= k <= N.
        rival: ``"top2"`` or ``"nearest"``, see :func:`linear_minimal_margin_score`.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.
        chunk_bytes: Room for logits, see :func:`linear_classification_margin`.
        group: The processes over which the classes are spread, see
            :func:`linear_classification_margin`.

    Returns:
        ``scores`` ``[k]`` ascending and ``indices`` ``[k]`` int64, rows of ``input``; equal
        scores by lowest index, NaN last.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range, or
            ranks of ``group`` disagree; then every rank raises.

    ``scores`` is differentiable (once) in ``input``, ``weight`` and ``bias``; the gradient works
    on the chosen samples only. Deterministic. Beside the result O(N) and ``chunk_bytes``.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> marginops.linear_select_minimal_margin(features, weight, k=1)
        Selection(scores=tensor([0.7071]), indices=tensor([0]))
    """
    if group is not None:
        fields = sharded.minimal_margin_score(
            input, weight, bias, rival, bias_in_norm, chunk_bytes, group, k
        )
        return Selection(*fields)
    checks.check_choice("rival", rival, get_args(Rival))
    checks.check_bias_in_norm(bias, bias_in_norm)
    dtype = _checked(input, weight, bias, chunk_bytes)
    k = checks.check_k(k, input.size(0), "rows of input")
    fields = linear_select_minimal_margin_op(
        input, weight, bias, k, bias_in_norm, rival == "nearest", dtype, chunk_bytes
    )
    return Selection(*fields[:2])


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
    """The k samples with the smallest classification margin, from their features.

    Equal to ``select_smallest(linear_classification_margin(input, weight, target, ...), k)``: how
    Banburski et al. (2021) reduce the training set, without logits.

    Args:
        input: ``[N, D]``, see :func:`linear_classification_margin`.
        weight: ``[C, D]``, C >= 2.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]``.
        k: How many, 0 <= k <= N.
        log_norm: Logarithm of the norm product, see :func:`classification_margin`.
        ignore_index: Samples with this target score ``+inf``; they come after all others.
        chunk_bytes: Room for logits, see :func:`linear_classification_margin`.
        group: The processes over which the classes are spread, see
            :func:`linear_classification_margin`.

    Returns:
        ``scores`` ``[k]`` ascending and ``indices`` ``[k]`` int64, rows of ``input``; equal
        scores by lowest index, NaN last.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range, or
            ranks of ``group`` disagree; then every rank raises.
        RuntimeError: A target is outside [0, C) (CPU); on CUDA a device-side assertion.

    ``scores`` is differentiable (once) in ``input``, ``weight``, ``bias`` and ``log_norm``; the
    gradient works on the chosen samples only. Deterministic. Beside the result O(N) and
    ``chunk_bytes``.

    Example:
        >>> features, weight = torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.eye(2)
        >>> target = torch.tensor([1, 1])
        >>> marginops.linear_select_classification_margin(features, weight, target, k=1)
        Selection(scores=tensor([-1.5000]), indices=tensor([1]))
    """
    if group is not None:
        fields = sharded.classification_margin(
            input, weight, target, bias, log_norm, ignore_index, chunk_bytes, group, k
        )
        return Selection(*fields)
    dtype = _checked(input, weight, bias, chunk_bytes)
    checks.check_target(target, input, ignore_index, "input")
    k = checks.check_k(k, input.size(0), "rows of input")
    log_norm = checks.as_log_norm(log_norm, input)
    fields = linear_select_classification_margin_op(
        input, weight, bias, target, log_norm, k, ignore_index, dtype, chunk_bytes
    )
    return Selection(*fields[:2])


def _checked(input: Any, weight: Any, bias: Any, chunk_bytes: Any) -> Any:
    """Check the head; return the dtype of the product, None for that of the arguments."""
    dtype = checks.check_linear(input, weight, bias)
    checks.check_classes(weight)
    check_chunk_bytes(chunk_bytes, weight, dtype)
    return dtype
