"""Gradients of margins, for whole rows of logits and for the rows that a selection chose."""

import torch
from torch import Tensor

from . import margin_pair as pairs
from ._library import define, raise_no_second_derivative, result_dtype, save_nothing


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
            add_in_order(total, first[part], scaled)
        totals.append(total.to(weight.dtype))
    return totals[0], totals[1]


def _pair_gradient_fake(
    key: Tensor, coefficient: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _class_sum_reference(key: Tensor, coefficient: Tensor, rows: Tensor, classes: int) -> Tensor:
    sums = coefficient.new_zeros(classes, rows.shape[1])
    index = key // max(len(rows), 1)
    for part in torch.arange(len(key), device=key.device).split(4096):
        scaled = coefficient[part].unsqueeze(1) * rows[key[part] % len(rows)].to(sums.dtype)
        add_in_order(sums, index[part], scaled)
    return sums


def _class_sum_fake(key: Tensor, coefficient: Tensor, rows: Tensor, classes: int) -> Tensor:
    return rows.new_empty((classes, rows.shape[1]), dtype=result_dtype(rows.dtype))


def add_in_order(sums: Tensor, index: Tensor, values: Tensor) -> None:
    """On each device the addition that has a fixed order of summation."""
    if sums.is_cuda:
        sums.index_put_((index,), values, accumulate=True)
    else:
        sums.index_add_(0, index, values)


def sum_pairs(
    value: Tensor, rows: Tensor, pair: Tensor, classes: int, kept: Tensor | None = None
) -> Tensor:
    """[C, D]: ``value_k * rows_k`` added to the first class of pair k, and taken from the second.

    Sorted by class, every class is one segment that one worker sums in a fixed order. ``kept``
    are the entries that count among the first classes of all pairs and then the second ones.
    """
    count = pair.shape[0]
    index, sample = pair.t().flatten(), torch.arange(count, device=pair.device).repeat(2)
    coefficient = torch.cat((value, -value))
    if kept is not None:
        index, sample, coefficient = index[kept], sample[kept], coefficient[kept]
    key, order = (index * count + sample).sort()
    return class_sum(key, coefficient[order], rows, classes)


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
        _, rival = pairs.classification_margin_rival(logits, target, None, rows, ignore_index)
        # An ignored row's rival is class 0; with class 1 beside it no entry is written twice.
        pair = torch.stack((torch.where(ignored, 1, label), rival), 1)
        grad_logits = _scatter_pair(pairs.normalize(grad, log_norm), pair, rows, logits)
    if needs_grad[1]:
        grad_log_norm = log_norm_gradient(grad, margin, label, ignore_index)
    return grad_logits, grad_log_norm


def log_norm_gradient(
    grad_margin: Tensor | None, margin: Tensor | None, target: Tensor, ignore_index: int
) -> Tensor | None:
    """The gradient of the margins for the log norm that scales them; None without margins."""
    if grad_margin is None or margin is None:
        return None
    return -torch.where(target == ignore_index, 0, grad_margin * margin).sum()


def boundary_gradient(
    grad: Tensor, score: Tensor | None, distance: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``f_i - f_j`` and, given the score, of half the squared distance of a pair.

    Both are 0 where the distance is 0.
    """
    slope = torch.where(distance == 0, 0, grad / distance)
    if score is None:
        return slope, None
    return slope, torch.where(distance == 0, 0, -slope * score / distance)


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
    pair, distance = pairs.minimal_margin_pair(logits.detach(), weight, bias, rows, nearest)
    slope, coefficient = boundary_gradient(grad, score, distance)
    grad_logits = grad_weight = grad_bias = None
    if needs_grad[0]:
        grad_logits = _scatter_pair(slope, pair, rows, logits)
    if (needs_grad[1] or needs_grad[2]) and coefficient is not None:
        # Each pair counts for both of its classes; sorted by class, every class is one segment
        # that one worker sums in a fixed order.
        first, second = pair.unbind(1)
        classes = weight.shape[0]
        key = torch.cat((first * classes + second, second * classes + first))
        key, order = key.sort(stable=True)
        coefficient = coefficient.repeat(2)[order]
        grad_weight, grad_bias = pair_gradient(key, coefficient, weight, bias)
    return grad_logits, grad_weight, grad_bias if needs_grad[2] else None


pair_gradient = define(
    "pair_gradient(Tensor key, Tensor coefficient, Tensor weight, Tensor? bias)"
    " -> (Tensor, Tensor)",
    _pair_gradient_reference,
    _pair_gradient_fake,
    backward=raise_no_second_derivative("minimal_margin_score"),
    setup_context=save_nothing,
)
class_sum = define(
    "class_sum(Tensor key, Tensor coefficient, Tensor rows, SymInt classes) -> Tensor",
    _class_sum_reference,
    _class_sum_fake,
    backward=raise_no_second_derivative("linear_*"),
    setup_context=save_nothing,
)
