"""Per-sample margins: the classification margin and the minimal margin score."""

from typing import Any, Literal, get_args

from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from . import margin_pair as pairs
from ._batches import Batch
from ._library import Op
from .arguments import (
    as_log_norm,
    check_bias,
    check_bias_in_norm,
    check_labelled_logits,
    check_logits,
    check_weight,
    warn_of_probabilities,
)
from .margin_gradient import margin_gradient, score_gradient
from .rows import row_layout
from .top2_margin import top2_margin_gradient, top2_margin_reference

Rival = Literal["top2", "nearest"]
RIVALS = get_args(Rival)


def classification_margin(
    logits: Tensor,
    target: Tensor,
    *,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Signed margin of every sample, optionally normalised by a product of layer norms.

    .. math:: \eta_n = (f_{n, y_n} - \max_{c \ne y_n} f_{n, c}) \, e^{-\mathrm{log\_norm}}

    The margin is positive where the sample is classified correctly. The classification margin and
    its normalisation by the product of the layers' norms are those of Banburski et al. (2021).

    Args:
        logits: ``[N, C]`` or ``[..., N, C]``, C >= 2, float32, float64, bfloat16 or float16, any
            strides. The last dimension counts the classes.
        target: ``[N]`` or ``[..., N]`` int64, classes in [0, C) or ``ignore_index``.
        log_norm: Natural logarithm of the norm product, a number or a 0-d tensor on the device
            of ``logits``. The kernel multiplies twice by ``exp(-log_norm / 2)``, so neither
            factor overflows or underflows before the product does.
        ignore_index: Samples with this target get ``+inf`` and no gradient.

    Returns:
        In the shape of ``target``, float64 for float64 logits, else float32, in units of the
        logits (divided by the norm product). A NaN in a row makes its margin NaN.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
            assertion, as in ``torch.nn.functional.cross_entropy``.

    The margins are differentiable in ``logits`` and ``log_norm``. Among tied rivals the lowest
    class takes the gradient. The result is deterministic. The op reads the logits once and needs
    at most 1 MiB of memory beside the result. Logits of more dimensions are read without a copy if
    their rows lie evenly in memory, and so are slices such as ``logits[:, :-1]`` that leave out at
    most half of the rows. Others are copied.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]])
        >>> marginops.classification_margin(logits, torch.tensor([0, 1]))
        tensor([ 1., -1.])
    """
    check_labelled_logits(logits, target, ignore_index, or_more=True)
    log_norm = as_log_norm(log_norm, logits)
    if logits.dim() == 2:
        return classification_margin_op(logits, target, log_norm, ignore_index)
    layout = row_layout(logits)
    matrix, column = layout.matrix(logits), layout.column(target, ignore_index)
    return layout.restore(classification_margin_op(matrix, column, log_norm, ignore_index))


class ClassificationMarginOp(Op):
    """The op behind :func:`marginops.classification_margin`."""

    schema = (
        "classification_margin(Tensor logits, Tensor target, Tensor? log_norm, int ignore_index)"
        " -> Tensor"
    )
    row_arguments = ("logits", "target")

    def call_batch(self, batch: Batch) -> Tensor | None:
        """Scale the margins afterwards if each element of the batch has a log norm of its own."""
        if "log_norm" not in batch.names:
            return super().call_batch(batch)
        margin = super().call_batch(batch.replace(log_norm=None))
        return pairs.normalize_batch(margin, batch)

    @staticmethod
    def reference(
        logits: Tensor, target: Tensor, log_norm: Tensor | None, ignore_index: int
    ) -> Tensor:
        margin, _ = pairs.classification_margin_rival_op.reference(
            logits, target, log_norm, None, ignore_index
        )
        return margin

    @staticmethod
    def fake(logits: Tensor, *_: Any) -> Tensor:
        return logits.new_empty((logits.shape[0],), dtype=result_dtype(logits.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logits, target, log_norm, ctx.ignore_index = inputs
        margin = output if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(logits, target, log_norm, margin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, margin = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_logits, grad_log_norm = margin_gradient(
            grad, margin, tuple(inputs), None, ctx.ignore_index, needs_grad
        )
        return grad_logits, None, grad_log_norm, None


classification_margin_op = ClassificationMarginOp()


def minimal_margin_score(
    logits: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
    softmax: bool = False,
) -> Tensor:
    r"""How far every sample is from the boundary between its two most likely classes.

    For one sample, let :math:`f` be its logits, :math:`p` their softmax, :math:`i_1, i_2` the
    classes of the two largest logits, and :math:`w_c` the rows of the last layer's weight:

    ================================= ==========================================================
    with ``weight``                   the distance of the features to the boundary,
                                      :math:`(f_{i_1} - f_{i_2}) / \lVert w_{i_1} - w_{i_2}
                                      \rVert_2`
    without ``weight``                the margin of the logits, :math:`f_{i_1} - f_{i_2}`
    without ``weight``, ``softmax``   the margin of the probabilities, :math:`p_{i_1} - p_{i_2}`
    ================================= ==========================================================

    The scores need no label. The distance is the minimal margin score of Weinstein et al. (2020).
    The margin of the probabilities is that of Scheffer et al. (2001). Selection by it is called
    margin sampling or breaking ties. **The three scores rank samples differently.** Logits
    (5, 4, -9) and (5, 4, 3.9) have the same margin of the logits, but the margins of their
    probabilities are 0.46 and 0.37.

    Args:
        logits: ``[N, C]`` or ``[..., N, C]``, C >= 2, float32, float64, bfloat16 or float16, any
            strides. The last dimension counts the classes.
        weight: ``[C, D]``, the last layer's weight, in the dtype of ``logits``. For bfloat16 and
            float16 logits it may also be float32, as it is under autocast. The function cannot
            see that a square weight is transposed.
        bias: ``[C]`` in the dtype of ``weight``; read only with ``bias_in_norm``.
        rival: ``"top2"`` for the formulas above, or ``"nearest"`` for the exact nearest boundary,
            ``min over j != i1 of (f_i1 - f_j) / ||w_i1 - w_j||``, which needs a weight.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.
        softmax: Compare probabilities instead of logits. Only without a weight.

    Returns:
        ``[N]`` or ``[..., N]``, float64 for float64 logits, else float32, at least 0. The unit is
        that of the features with a weight and that of the logits without. The margin of
        probabilities is at most 1. It is accurate relative to its value, however small. If two rows
        of ``weight`` are equal, their distance is 0: then 0 / 0 is 0 and positive / 0 is ``+inf``.
        A NaN in a row of logits makes its score NaN, and so does a second infinity of the same sign
        where the two largest logits are infinite. If only the largest logit is ``+inf``, the score
        is ``+inf``, and the margin of the probabilities is 1.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value; ``weight`` is missing with
            ``bias``, ``rival="nearest"`` or ``bias_in_norm``; or it is given with ``softmax``.

    The scores are differentiable in ``logits``, ``weight`` and, with ``bias_in_norm``, ``bias``.
    The classes i1 and i2 are constants; among ties the lowest class counts. Where the distance of
    two rows is 0 the gradient is 0. Second derivatives exist for ``logits`` only, and not with
    ``softmax``. The result is deterministic.

    The op reads the logits once and two rows of ``weight`` per sample. Where it is cheaper, the op
    computes a table of all distances instead. With ``"nearest"`` it reads further rows only where
    a bound cannot exclude them. Beside the result it needs O(N) memory for the table, C + D values
    for ``"nearest"``, and at most 1 MiB.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]])
        >>> marginops.minimal_margin_score(logits)
        tensor([1., 1.])
        >>> marginops.minimal_margin_score(logits, softmax=True)
        tensor([0.3973, 0.4560])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> marginops.minimal_margin_score(logits, weight)
        tensor([1., 1.])
    """
    bias, nearest = checked_head(logits, weight, bias, rival, bias_in_norm, softmax, or_more=True)
    if weight is not None:
        warn_of_probabilities(logits)
    if logits.dim() == 2:
        return minimal_margin_score_op(logits, weight, bias, nearest, softmax)
    # Rows in gaps have scores, too. Their zero gradients could be NaN in weight and bias.
    has_gaps = not any(value is not None and value.requires_grad for value in (weight, bias))
    layout = row_layout(logits, has_gaps)
    scores = minimal_margin_score_op(layout.matrix(logits), weight, bias, nearest, softmax)
    return layout.restore(scores)


def checked_head(
    logits: Any,
    weight: Any,
    bias: Any,
    rival: Any,
    bias_in_norm: Any,
    softmax: Any,
    or_more: bool = False,
) -> tuple[Tensor | None, bool]:
    """Check the arguments of a minimal margin score. With ``or_more``, logits are [..., N, C].

    Returns:
        The bias if it is part of the norm, else None; and whether ``rival`` is ``"nearest"``.
    """
    check_logits(logits, or_more)
    checks.check_choice("rival", rival, RIVALS)
    if not isinstance(softmax, bool):
        raise TypeError(f"softmax: expected a bool, got {type(softmax).__name__}")
    if weight is None:
        needs = {"bias": bias is not None, 'rival="nearest"': rival == "nearest"}
        needs["bias_in_norm=True"] = bool(bias_in_norm)
        for option in (option for option, given in needs.items() if given):
            raise ValueError(
                f"weight: expected a tensor [C, D] for {option}, got None; "
                f"pass the last layer's weight or leave out {option}"
            )
        return None, False
    check_weight(weight, logits)
    if softmax:
        raise ValueError(
            "softmax: expected False with a weight, got True; leave out the weight for the "
            "margin of the probabilities"
        )
    if bias is not None:
        check_bias(bias, weight)
    check_bias_in_norm(bias, bias_in_norm)
    return (bias if bias_in_norm else None), rival == "nearest"


class MinimalMarginScoreOp(Op):
    """The op behind :func:`marginops.minimal_margin_score`.

    ``bias`` is None unless it is part of the norm. Without ``weight``, ``bias`` and ``nearest`` do
    not count, and with it ``softmax`` does not.
    """

    schema = (
        "minimal_margin_score(Tensor logits, Tensor? weight, Tensor? bias, bool nearest,"
        " bool softmax) -> Tensor"
    )
    row_arguments = ("logits",)

    @staticmethod
    def reference(
        logits: Tensor, weight: Tensor | None, bias: Tensor | None, nearest: bool, softmax: bool
    ) -> Tensor:
        if weight is None:
            return top2_margin_reference(logits, softmax)
        pair, distance = pairs.minimal_margin_pair_op.reference(logits, weight, bias, None, nearest)
        first, second = logits.gather(1, pair).to(distance.dtype).unbind(1)
        return pairs.boundary_distance(first - second, distance)

    @staticmethod
    def fake(logits: Tensor, *_: Any) -> Tensor:
        return logits.new_empty((logits.shape[0],), dtype=result_dtype(logits.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.nearest, ctx.softmax = inputs
        needs_score = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(*tensors, output if needs_score else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, weight, bias, score = ctx.saved_tensors
        if weight is None:
            gradient = top2_margin_gradient(grad, logits, None, ctx.softmax)
            return gradient, None, None, None, None
        gradients = score_gradient(
            grad, score, (logits, weight, bias), None, ctx.nearest, ctx.needs_input_grad[:3]
        )
        return *gradients, None, None


minimal_margin_score_op = MinimalMarginScoreOp()
