"""Classification margins of a linear head, without the whole matrix of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import margin_pair as pairs
from .linear_arguments import checked_linear_head
from .linear_gradient import margin_gradients
from .linear_head import LinearHead, Tensors, join
from .linear_op import Gradients, Kept, LinearOp, empty_results
from .margin_gradient import log_norm_gradient
from .select import Selection
from .tiles import check_rows

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
    head = checked_linear_head(
        "linear_classification_margin",
        (input, weight, bias),
        chunk_bytes,
        group,
        labels=(target, ignore_index),
        log_norm=log_norm,
    )
    return head.in_shape(linear_classification_margin_op.call(head)[0])


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
    head = checked_linear_head(
        "linear_select_classification_margin",
        (input, weight, bias),
        chunk_bytes,
        group,
        labels=(target, ignore_index),
        log_norm=log_norm,
        selects=True,
        k=k,
    )
    return Selection(*linear_classification_margin_op.call(head)[:2])


class LinearClassificationMarginOp(LinearOp):
    """Computes margins of a linear head, the indices of those that ``k`` selects, and rivals."""

    schema = (
        "linear_classification_margin(Tensor input, Tensor weight, Tensor? bias, Tensor target,"
        " Tensor? log_norm, SymInt? k, int ignore_index, ScalarType? dtype, int? chunk_bytes)"
        " -> (Tensor, Tensor, Tensor)"
    )
    constants = (("indices", 1), ("rival", 2))
    row_arguments = ("input", "target")

    @staticmethod
    def compute(head: LinearHead) -> Tensors:
        check_rows(head.input, target=head.target)
        if (tiles := head.tiles_of_whole_rows()) is None:
            margin, rival, *_ = head.statistics(None)
            return head.smallest(margin, rival)
        parts = [
            pairs.classification_margin_rival_op(
                logits, head.target[rows], head.log_norm, None, head.ignore_index
            )
            for rows, _, logits in tiles
        ]
        return head.smallest(*join(parts))

    @staticmethod
    def empty(head: LinearHead) -> Tensors:
        return empty_results(head, "value", "index", "class")

    @staticmethod
    def keep(results: Tensors, needs_grad: set[str]) -> Kept:
        margin, _, rival = results
        return rival, margin if "log_norm" in needs_grad else None

    @staticmethod
    def differentiate(head: LinearHead, kept: Any, grads: Any, needs_grad: set[str]) -> Gradients:
        rival, margin = kept
        gradients = margin_gradients(head, grads[0], rival, needs_grad)
        gradients["log_norm"] = log_norm_gradient(grads[0], margin, head.target, head.ignore_index)
        return gradients


linear_classification_margin_op = LinearClassificationMarginOp()
