"""Per-sample margins: the classification margin and the minimal margin score."""

from typing import Any, Literal

import torch
from torch import Tensor

from . import _checks as checks
from ._library import define, result_dtype

Rival = Literal["top2", "nearest"]


def classification_margin(
    logits: Tensor,
    target: Tensor,
    *,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""Signed margin of every sample, optionally normalised by a product of layer norms.

    .. math:: \eta_n = (f_{n, y_n} - \max_{c \ne y_n} f_{n, c}) \, e^{-\mathrm{log\_norm}}

    Positive where the sample is classified correctly. The classification margin and its
    normalisation by the product of the layers' norms are those of Banburski et al. (2021).

    Args:
        logits: ``[N, C]``, C >= 2, float32, float64, bfloat16 or float16, any strides.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        log_norm: Natural logarithm of the norm product, a number or a 0-d tensor on the device
            of ``logits``; applied inside the kernel as two factors ``exp(-log_norm / 2)``, so
            neither over- nor underflows before the product does.
        ignore_index: Samples with this target get ``+inf`` and no gradient.

    Returns:
        ``[N]``, float64 for float64 logits, else float32, in units of the logits (divided by
        the norm product). A NaN in a row makes its margin NaN.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        RuntimeError: A target is outside [0, C) (CPU). On CUDA this is a device-side assertion,
            as in ``torch.nn.functional.cross_entropy``.

    Differentiable in ``logits`` (among tied rivals the lowest class takes the gradient) and
    ``log_norm``. Deterministic. Reads the logits once; at most 1 MiB beside the result.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]])
        >>> marginops.classification_margin(logits, torch.tensor([0, 1]))
        tensor([ 1., -1.])
    """
    checks.check_logits(logits)
    checks.check_target(target, logits, ignore_index)
    return _classification_margin(
        logits, target, checks.as_log_norm(log_norm, logits), ignore_index
    )


def minimal_margin_score(
    logits: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
) -> Tensor:
    r"""Distance of every sample's features to its closest decision boundary.

    With :math:`i_1, i_2` the classes of the two largest logits and :math:`w_c` the rows of
    the last layer,

    .. math:: s_n = (f_{n, i_1} - f_{n, i_2}) / \lVert w_{i_1} - w_{i_2} \rVert_2 \ge 0

    No label enters. This is the minimal margin score of Weinstein et al. (2020).

    Args:
        logits: ``[N, C]``, C >= 2, float32, float64, bfloat16 or float16, any strides.
        weight: ``[C, D]``, the last layer's weight, in the dtype of ``logits`` or float32 beside
            bfloat16 / float16 logits (what autocast gives).
        bias: ``[C]`` in the dtype of ``weight``; read only with ``bias_in_norm``.
        rival: ``"top2"``, as above, or ``"nearest"``, the exact nearest boundary,
            ``min over j != i1 of (f_i1 - f_j) / ||w_i1 - w_j||``.
        bias_in_norm: Count the bias as one more column of ``weight`` in the norm.

    Returns:
        ``[N]``, float64 for float64 logits, else float32, in units of the features. Between two
        equal rows of ``weight``, 0 / 0 is 0 and positive / 0 is ``+inf``. A NaN in a row of
        logits makes its score NaN.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.

    Differentiable in ``logits``, ``weight`` and, with ``bias_in_norm``, ``bias``; classes are
    constants, ties go to the lowest class, and where the distance is 0 the gradient is 0. Second
    derivatives exist for ``logits`` only. Deterministic. Reads the logits once and two rows of
    ``weight`` per sample, or a table of all distances where that is cheaper; ``"nearest"`` reads
    further rows only where a bound cannot exclude them. Beside the result O(N) scratch for the
    table, C + D values for ``"nearest"``, and at most 1 MiB.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]])
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> marginops.minimal_margin_score(logits, weight)
        tensor([1., 1.])
    """
    bias, nearest = checked_head(logits, weight, bias, rival, bias_in_norm)
    return _minimal_margin_score(logits, weight, bias, nearest)


def checked_head(
    logits: Any, weight: Any, bias: Any, rival: Any, bias_in_norm: Any
) -> tuple[Tensor | None, bool]:
    """Check the arguments of a minimal margin score; return the bias that counts, and nearest."""
    checks.check_logits(logits)
    checks.check_weight(weight, logits)
    if bias is not None:
        checks.check_bias(bias, weight)
    elif bias_in_norm:
        raise ValueError("bias: expected a tensor [C] because bias_in_norm=True, got None")
    if rival not in ("top2", "nearest"):
        raise ValueError(f'rival: expected "top2" or "nearest", got {rival!r}')
    return (bias if bias_in_norm else None), rival == "nearest"


def normalize(margin: Tensor, log_norm: Tensor | None) -> Tensor:
    """``margin * exp(-log_norm)`` in two finite factors."""
    if log_norm is None:
        return margin
    half = torch.exp(-log_norm / 2).clamp(max=torch.finfo(margin.dtype).max)
    return margin * half * half


def _rival_class(logits: Tensor, target: Tensor) -> Tensor:
    """``argmax over c != target``, lowest class first."""
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf)
    rival = others.argmax(1)
    # Only where every other logit is -inf can argmax land on the target, and then on class 0.
    return torch.where(rival == target, (target == 0).to(torch.int64), rival)


def _checked_target(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The ignored samples, and targets with class 0 in their place."""
    ignored = target == ignore_index
    valid = ((target >= 0) & (target < classes)) | ignored
    if target.is_cuda:
        torch._assert_async(valid.all())
    elif not valid.all():
        wrong = target[~valid][0].item()
        raise RuntimeError(
            f"target: expected classes in [0, {classes}) or ignore_index {ignore_index}, "
            f"got {wrong}"
        )
    return ignored, torch.where(ignored, 0, target)


def _margin_reference(
    logits: Tensor, target: Tensor, log_norm: Tensor | None, ignore_index: int
) -> Tensor:
    ignored, label = _checked_target(target, logits.shape[1], ignore_index)
    values = logits.to(result_dtype(logits.dtype))
    own = values.gather(1, label.unsqueeze(1)).squeeze(1)
    others = values.scatter(1, label.unsqueeze(1), -torch.inf)
    margin = own - others.amax(1)
    return torch.where(ignored, torch.inf, normalize(margin, log_norm))


def _margin_fake(
    logits: Tensor, target: Tensor, log_norm: Tensor | None, ignore_index: int
) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=result_dtype(logits.dtype))


def _rival_reference(
    logits: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int
) -> Tensor:
    if rows is not None:
        logits, target = logits[rows], target[rows]
    ignored, label = _checked_target(target, logits.shape[1], ignore_index)
    rival = torch.where(logits.isnan().any(1), (label == 0).long(), _rival_class(logits, label))
    return torch.where(ignored, 0, rival)


def _rival_fake(logits: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    return torch.empty_like(target if rows is None else rows)


def _distance(weight: Tensor, bias: Tensor | None, pair: Tensor) -> Tensor:
    """``||w_i - w_j||`` of each pair [K, 2], free of over- and underflow in the squares."""
    dtype = result_dtype(weight.dtype)
    difference = weight[pair[:, 0]].to(dtype) - weight[pair[:, 1]].to(dtype)
    if bias is not None:
        step = bias[pair[:, 0]].to(dtype) - bias[pair[:, 1]].to(dtype)
        difference = torch.cat((difference, step.unsqueeze(1)), 1)
    if difference.shape[1] == 0:
        return difference.new_zeros(len(pair))
    largest = difference.abs().amax(1, keepdim=True)
    scale = torch.where((largest > 0) & (largest < torch.inf), largest, 1)
    return torch.linalg.vector_norm(difference / scale, dim=1) * scale.squeeze(1)


def _boundary_distance(difference: Tensor, distance: Tensor) -> Tensor:
    return torch.where((difference == 0) & (distance == 0), 0, difference / distance)


def _pair_reference(
    logits: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, nearest: bool
) -> tuple[Tensor, Tensor]:
    if rows is not None:
        logits = logits[rows]
    nan = logits.isnan().any(1)
    first = logits.argmax(1)
    second = _rival_class(logits, first)
    if nearest:
        # A plain loop: a table of all distances would need [C, C].
        for row, best in enumerate(first.tolist()):
            others = torch.arange(logits.shape[1], device=logits.device)
            others = others[others != best]
            candidates = torch.stack((torch.full_like(others, best), others), 1)
            values = logits[row].to(result_dtype(logits.dtype))
            quotient = _boundary_distance(
                values[best] - values[others], _distance(weight, bias, candidates)
            )
            second[row] = others[quotient.argmin()]
    pair = torch.stack((first, second), 1)
    pair[nan] = torch.tensor([0, 1], device=pair.device)
    distance = _distance(weight, bias, pair).to(result_dtype(logits.dtype))
    return pair, torch.where(nan, torch.nan, distance)


def _pair_fake(
    logits: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, nearest: bool
) -> tuple[Tensor, Tensor]:
    count = logits.shape[0] if rows is None else rows.shape[0]
    return (
        logits.new_empty((count, 2), dtype=torch.int64),
        logits.new_empty((count,), dtype=result_dtype(logits.dtype)),
    )


def _score_reference(logits: Tensor, weight: Tensor, bias: Tensor | None, nearest: bool) -> Tensor:
    pair, distance = _pair_reference(logits, weight, bias, None, nearest)
    values = logits.gather(1, pair).to(distance.dtype)
    return _boundary_distance(values[:, 0] - values[:, 1], distance)


def _score_fake(logits: Tensor, weight: Tensor, bias: Tensor | None, nearest: bool) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=result_dtype(logits.dtype))


def _pair_gradient_reference(
    key: Tensor, coefficient: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = coefficient.dtype
    first, second = key // len(weight), key % len(weight)
    totals = []
    for rows in (weight, weight.new_zeros(len(weight)) if bias is None else bias):
        total = torch.zeros_like(rows, dtype=dtype)
        for part in torch.arange(len(key), device=key.device).split(4096):
            difference = rows[first[part]].to(dtype) - rows[second[part]].to(dtype)
            scaled = coefficient[part].reshape(-1, *[1] * (rows.dim() - 1)) * difference
            if key.is_cuda:  # on each device the one that has a fixed order of summation
                total.index_put_((first[part],), scaled, accumulate=True)
            else:
                total.index_add_(0, first[part], scaled)
        totals.append(total.to(weight.dtype))
    return totals[0], totals[1]


def _pair_gradient_fake(
    key: Tensor, coefficient: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _scatter_pair(value: Tensor, pair: Tensor, rows: Tensor | None, logits: Tensor) -> Tensor:
    """Zeros like ``logits`` but for +value and -value at the two classes of each row."""
    values = torch.stack((value, 0 - value), 1).to(logits.dtype)
    zeros = values.new_zeros(logits.shape)
    if rows is None:
        return zeros.scatter_(1, pair, values)
    return zeros.index_put_((rows.unsqueeze(1), pair), values)


def margin_gradient(
    grad: Tensor,
    margin: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    rows: Tensor | None,
    ignore_index: int,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the margins of ``rows`` (all, if None) for logits and log_norm.

    The margins are needed only for log_norm.
    """
    logits, target, log_norm = inputs
    label = target if rows is None else target[rows]
    ignored = label == ignore_index
    grad = torch.where(ignored, 0, grad)
    grad_logits = grad_log_norm = None
    if needs_grad[0]:
        rival = _classification_margin_rival(logits, target, rows, ignore_index)
        # An ignored row's rival is class 0; with class 1 beside it no entry is written twice.
        pair = torch.stack((torch.where(ignored, 1, label), rival), 1)
        grad_logits = _scatter_pair(normalize(grad, log_norm), pair, rows, logits)
    if needs_grad[1] and margin is not None:
        grad_log_norm = -(grad * torch.where(ignored, 0, margin)).sum()
    return grad_logits, grad_log_norm


def score_gradient(
    grad: Tensor,
    score: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    rows: Tensor | None,
    nearest: bool,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the scores of ``rows`` (all, if None) for logits, weight and bias.

    The scores are needed only for weight and bias.
    """
    logits, weight, bias = inputs
    pair, distance = _minimal_margin_pair(logits.detach(), weight, bias, rows, nearest)
    slope = torch.where(distance == 0, 0, grad / distance)
    grad_logits = grad_weight = grad_bias = None
    if needs_grad[0]:
        grad_logits = _scatter_pair(slope, pair, rows, logits)
    if (needs_grad[1] or needs_grad[2]) and score is not None:
        coefficient = torch.where(distance == 0, 0, -slope * score / distance)
        # Each pair counts for both of its classes; sorted by class, every class is one segment
        # that one worker sums in a fixed order.
        first, second = pair.unbind(1)
        classes = weight.shape[0]
        key = torch.cat((first * classes + second, second * classes + first))
        key, order = key.sort(stable=True)
        coefficient = coefficient.repeat(2)[order]
        grad_weight, grad_bias = _pair_gradient(key, coefficient, weight, bias)
    return grad_logits, grad_weight, grad_bias if needs_grad[2] else None


def _margin_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, log_norm, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, log_norm, output if ctx.needs_input_grad[2] else None)


def _margin_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, margin = ctx.saved_tensors
    needs_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_logits, grad_log_norm = margin_gradient(
        grad, margin, tuple(inputs), None, ctx.ignore_index, needs_grad
    )
    return grad_logits, None, grad_log_norm, None


def _score_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.nearest = inputs
    needs_score = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(*tensors, output if needs_score else None)


def _score_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, score = ctx.saved_tensors
    gradients = score_gradient(
        grad, score, tuple(inputs), None, ctx.nearest, ctx.needs_input_grad[:3]
    )
    return *gradients, None


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("minimal_margin_score: second derivatives are not implemented")


_classification_margin = define(
    "classification_margin(Tensor logits, Tensor target, Tensor? log_norm, int ignore_index)"
    " -> Tensor",
    _margin_reference,
    _margin_fake,
    backward=_margin_backward,
    setup_context=_margin_context,
)
_classification_margin_rival = define(
    "classification_margin_rival(Tensor logits, Tensor target, Tensor? rows, int ignore_index)"
    " -> Tensor",
    _rival_reference,
    _rival_fake,
)
_minimal_margin_score = define(
    "minimal_margin_score(Tensor logits, Tensor weight, Tensor? bias, bool nearest) -> Tensor",
    _score_reference,
    _score_fake,
    backward=_score_backward,
    setup_context=_score_context,
)
_minimal_margin_pair = define(
    "minimal_margin_pair(Tensor logits, Tensor weight, Tensor? bias, Tensor? rows, bool nearest)"
    " -> (Tensor, Tensor)",
    _pair_reference,
    _pair_fake,
    backward=_no_second_derivative,
    setup_context=_no_context,
)
_pair_gradient = define(
    "pair_gradient(Tensor key, Tensor coefficient, Tensor weight, Tensor? bias)"
    " -> (Tensor, Tensor)",
    _pair_gradient_reference,
    _pair_gradient_fake,
    backward=_no_second_derivative,
    setup_context=_no_context,
)
