"""Multi-margin regularization: a term of the loss that makes margins larger."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .. import _advice as advice
from .. import _checks as checks
from .._checks import result_dtype
from . import margin_pair as pairs
from ._library import Op
from .arguments import check_bias_shape, check_classes, check_features, check_linear, check_logits
from .linear_head import LinearHead
from .linear_margin import linear_classification_margin_op
from .margin_gradient import distance_gradient
from .tiles import check_rows

Reduction = Literal["square_of_mean", "mean_of_square"]


def multi_margin_regularization(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    reduction: Reduction = "square_of_mean",
    ignore_index: int = -100,
) -> Tensor:
    r"""A term of the loss: distances between class vectors of the last layer, times a feature norm.

    For each sample n let :math:`h_n` be its features, :math:`f_n` its logits, :math:`y_n` its
    target and :math:`r_n` the rival class. With ``reduction="square_of_mean"``, as in the code of
    Weinstein, Fine, Hel-Or (2020), the term is

    .. math:: \Big( R \; \frac{1}{N} \sum_n \lVert w_{y_n} - w_{r_n} \rVert_2 \Big)^2, \qquad
        R = \max_n \lVert h_n \rVert_2, \qquad r_n = \arg\max_{c \ne y_n} f_{nc}.

    With ``"mean_of_square"`` it is
    :math:`\frac{1}{N} \sum_n (R \lVert w_{y_n} - w_{r_n} \rVert_2)^2`.

    The distance of a sample to a decision boundary is a difference of logits divided by
    :math:`\lVert w_y - w_r \rVert_2`. So a small term means large margins. The term does not
    change if the features grow and the weight shrinks by the same factor.

    Args:
        input: ``[N, D]``, the features :math:`h` before the last layer, float32, float64, bfloat16
            or float16.
        weight: ``[C, D]``, C >= 2, rows :math:`w_c`, in the dtype of ``input``. If neither is
            float64, the two dtypes may differ.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        logits: ``[N, C]``, any of these dtypes. They only determine the rivals. Without them the
            function computes the logits ``F.linear(input, weight, bias)`` tile by tile.
        bias: ``[C]``, part of the logits if these are not given. The norms leave it out.
        reduction: ``"square_of_mean"`` or ``"mean_of_square"``.
        ignore_index: Samples with this target count neither in the mean nor in R.

    Returns:
        A scalar, float64 for float64 ``weight``, else float32, in squared units of the logits. It
        is NaN if no sample counts, as in ``F.cross_entropy``, or if a logit of a sample is NaN.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
            assertion.

    The squares of the features have to be in the range of the result's dtype, as in
    ``torch.linalg.vector_norm``.

    The term is differentiable (once) in ``weight`` and ``input``. In ``weight``, both rows of each
    pair have a gradient; two equal rows have gradient 0. In ``input``, only the row with the
    largest norm gets a gradient, the first such row among ties. The rivals are constants. The
    result is deterministic. The function reads the logits once and two rows of ``weight`` per
    sample. Without ``logits`` it also computes the matrix product, see
    :func:`marginops.linear_classification_margin`.

    Example:
        >>> features, weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.eye(2)
        >>> marginops.multi_margin_regularization(features, weight, torch.tensor([0, 1]))
        tensor(50.)
    """
    checks.check_choice("reduction", reduction, get_args(Reduction))
    margin, rival = _rivals(input, weight, target, logits, bias, ignore_index)
    value: Tensor = multi_margin_regularization_op(
        input, weight, target, rival, margin, reduction == "mean_of_square", ignore_index
    )[0]
    return value


def _rivals(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    logits: Tensor | None,
    bias: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Margins and rivals of all samples, without gradients."""
    if logits is None:
        dtype = check_linear(input, weight, bias)
        check_classes(weight)
        checks.check_target(target, input, ignore_index, "input")
        head = LinearHead(
            input.detach(),
            weight.detach(),
            None if bias is None else bias.detach(),
            target,
            ignore_index=ignore_index,
            dtype=dtype,
        )
        margin, _, rival = linear_classification_margin_op.call(head)
        return margin, rival
    check_logits(logits)
    check_features(input, logits)
    checks.check_tensor("weight", weight, 2, "[C, D]")
    if weight.shape != (logits.shape[1], input.shape[1]):
        raise ValueError(
            f"weight: expected shape {[logits.shape[1], input.shape[1]]} for logits "
            f"{list(logits.shape)} and input {list(input.shape)}, got {list(weight.shape)}"
            f"{advice.for_transposed('weight', weight, logits.shape[1], input.shape[1])}"
        )
    checks.check_device("weight", weight, input, "input")
    if weight.dtype != input.dtype and torch.float64 in (weight.dtype, input.dtype):
        raise TypeError(f"weight: expected dtype {input.dtype} as input, got {weight.dtype}")
    if bias is not None:
        check_bias_shape(bias, weight)
    checks.check_target(target, logits, ignore_index)
    margin, rival = pairs.classification_margin_rival_op(
        logits.detach(), target, None, None, ignore_index
    )
    return margin, rival


def _pair(target: Tensor, rival: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which samples are ignored, and label and rival of every sample.

    An ignored sample gets class 1 as its label, since its rival is class 0.
    """
    ignored = target == ignore_index
    return ignored, torch.stack((torch.where(ignored, 1, target), rival), 1)


class MultiMarginRegularizationOp(Op):
    """The op behind :func:`marginops.multi_margin_regularization`.

    It returns the term and what the gradient needs: the largest norm of the features, the row of
    this norm, 1 / N, and the distance of each pair.
    """

    schema = (
        "multi_margin_regularization(Tensor input, Tensor weight, Tensor target, Tensor rival,"
        " Tensor margin, bool mean_of_square, int ignore_index)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    constants = (("radius", 1), ("share", 3), ("distance", 4))
    has_kernels = False

    @staticmethod
    def reference(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        rival: Tensor,
        margin: Tensor,
        mean_of_square: bool,
        ignore_index: int,
    ) -> tuple[Tensor, ...]:
        check_rows(input, target=target, rival=rival, margin=margin)
        dtype = result_dtype(weight.dtype)
        if input.shape[0] == 0:
            wide = input.new_full((), torch.nan, dtype=torch.float64)
            distance = wide.new_empty(0, dtype=dtype)
            return wide.to(dtype, copy=True), wide, target.new_zeros(()), wide.clone(), distance
        ignored, pair = _pair(target, rival, ignore_index)
        distance = pairs.pair_distance_op(weight, None, pair)
        distance = torch.where(ignored, 0, torch.where(margin.isnan(), torch.nan, distance))
        # In float64, because the term may be in the range of float32 although its parts are not.
        share = 1 / (~ignored).sum().double()
        norm = torch.linalg.vector_norm(input, dim=1, dtype=torch.float64)
        radius, row = torch.where(ignored, 0, norm).max(0)
        if mean_of_square:
            value = (radius * distance).square().sum() * share
        else:
            value = (radius * (distance.sum(dtype=torch.float64) * share)).square()
        value = torch.where(ignored.all(), torch.nan, value).to(dtype)
        return value, radius, row, share, distance

    @staticmethod
    def fake(input: Tensor, weight: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, ...]:
        dtype = result_dtype(weight.dtype)
        value, wide = (input.new_empty((), dtype=kind) for kind in (dtype, torch.float64))
        row = target.new_empty(())
        return value, wide, row, wide.clone(), value.new_empty(input.shape[:1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, weight, target, rival, _, ctx.mean_of_square, ctx.ignore_index = inputs
        ctx.save_for_backward(input, weight, target, rival, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        gradients = multi_margin_regularization_gradient_op(
            grad, *ctx.saved_tensors, ctx.mean_of_square, ctx.ignore_index, *needed
        )
        given = (value if need else None for value, need in zip(gradients, needed, strict=True))
        return *given, None, None, None, None, None


multi_margin_regularization_op = MultiMarginRegularizationOp()


class MultiMarginRegularizationGradientOp(Op):
    """Gradients in input and weight. A gradient that is not needed is empty."""

    schema = (
        "multi_margin_regularization_gradient(Tensor grad, Tensor input, Tensor weight,"
        " Tensor target, Tensor rival, Tensor radius, Tensor row, Tensor share, Tensor distance,"
        " bool mean_of_square, int ignore_index, bool needs_grad_input, bool needs_grad_weight)"
        " -> (Tensor, Tensor)"
    )
    has_kernels = False

    @staticmethod
    def reference(
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        rival: Tensor,
        radius: Tensor,
        row: Tensor,
        share: Tensor,
        distance: Tensor,
        mean_of_square: bool,
        ignore_index: int,
        needs_grad_input: bool,
        needs_grad_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        check_rows(input, target=target, rival=rival, distance=distance)
        # In float64, because a product may be in the range of float32 although its parts are not.
        dtype, wide, distance = grad.dtype, grad.double(), distance.double()
        mean = distance.sum() * share
        grad_input, grad_weight = input.new_empty(0), weight.new_empty(0)
        if needs_grad_input:
            grad_input = torch.zeros_like(input)
        if needs_grad_input and input.shape[0] > 0:
            # d value / d radius = 2 * radius * square, and d radius / d longest = longest / radius.
            square = distance.square().sum() * share if mean_of_square else mean.square()
            # A 0-d float64 tensor would not make a float32 product float64.
            longest = input.index_select(0, row.reshape(1)).double()
            scaled = 2 * wide * square * longest
            grad_input.index_copy_(0, row.reshape(1), scaled.to(input.dtype))
        if needs_grad_weight:
            scale = 2 * wide * share * radius.square()
            if mean_of_square:
                coefficient = scale.expand_as(distance)
            else:
                coefficient = torch.where(distance == 0, 0, scale * mean / distance)
            ignored, pair = _pair(target, rival, ignore_index)
            coefficient = torch.where(ignored, 0, coefficient)
            # The products with rows of the weight may be in range although this factor is not.
            largest = torch.cat((wide.new_zeros(1), coefficient.abs())).amax()
            is_far = (largest > 0) & ((largest < 1e-30) | (largest > 1e30)) & largest.isfinite()
            unit = torch.where(is_far, largest, 1)
            grad_weight, _ = distance_gradient((coefficient / unit).to(dtype), pair, weight, None)
            grad_weight = (grad_weight.double() * unit).to(weight.dtype)
        return grad_input, grad_weight

    @staticmethod
    def fake(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        needs_grad_input, needs_grad_weight = rest[-2:]
        return (
            torch.empty_like(input) if needs_grad_input else input.new_empty(0),
            weight.new_empty(weight.shape) if needs_grad_weight else weight.new_empty(0),
        )


multi_margin_regularization_gradient_op = MultiMarginRegularizationGradientOp()
