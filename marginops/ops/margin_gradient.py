"""Gradients of margins and scores, of all samples or of those that a selection chose."""

from typing import Any

import torch
from torch import Tensor

from . import margin_pair as pairs
from ._batches import Batch
from ._library import Op
from .class_sum import add_in_order


class PairGradientOp(Op):
    """Does the work of :func:`distance_gradient` on sorted pairs of classes.

    ``key`` is ``first class * number of classes + second class``, in ascending order.
    """

    schema = (
        "pair_gradient(Tensor key, Tensor coefficient, Tensor weight, Tensor? bias)"
        " -> (Tensor, Tensor)"
    )

    def call_batch(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Number the classes of all elements of the batch."""
        key, _, weight, _ = batch.values.values()
        classes = weight.shape[-2]
        offset = batch.offset(classes, key)
        key = (key // classes + offset) * (batch.size * classes) + key % classes + offset
        rest = (batch.joined(name) for name in ("coefficient", "weight", "bias"))
        grad_weight, grad_bias = self(key.flatten(), *rest)
        return batch.split(grad_weight, classes), batch.split(grad_bias, classes)

    @staticmethod
    def reference(
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

    @staticmethod
    def fake(key: Tensor, coefficient: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


pair_gradient_op = PairGradientOp()


def distance_gradient(
    coefficient: Tensor, pair: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of ``sum_k coefficient_k ||w_i - w_j||^2 / 2`` in weight and bias.

    Row k of ``pair`` is (i, j). Each pair counts for both of its classes. The pairs are sorted by
    class, so that one worker sums all pairs of a class in a fixed order.
    """
    first, second = pair.unbind(1)
    classes = weight.shape[0]
    key = torch.cat((first * classes + second, second * classes + first))
    key, order = key.sort(stable=True)
    gradients: tuple[Tensor, Tensor] = pair_gradient_op(
        key, coefficient.repeat(2)[order], weight, bias
    )
    return gradients


def write(method: str, zeros: Tensor, *arguments: Any) -> Tensor:
    """Write values into zeros by a method such as ``scatter_``. The result may be a copy.

    Under torch.vmap these methods raise errors or give wrong numbers if the zeros are the same for
    the whole batch. So the copying form of the method is used there.
    """
    if torch._C._are_functorch_transforms_active():
        method = method.removesuffix("_")
    written: Tensor = getattr(zeros, method)(*arguments)
    return written


def scatter_pair(value: Tensor, pair: Tensor, rows: Tensor | None, logits: Tensor) -> Tensor:
    """Zeros like ``logits``, with +value and -value at the two classes of each of ``rows``."""
    values = torch.stack((value, 0 - value), 1).to(logits.dtype)
    zeros = values.new_zeros(logits.shape)
    if rows is None:
        return write("scatter_", zeros, 1, pair, values)
    return write("index_put_", zeros, (rows.unsqueeze(1), pair), values)


def margin_gradient(
    grad: Tensor,
    margin: Tensor | None,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    rows: Tensor | None,
    ignore_index: int,
    needs_grad: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the margins of ``rows`` (all if None) in logits and log_norm.

    ``margin`` is needed only for the gradient in log_norm.
    """
    logits, target, log_norm = inputs
    label = target if rows is None else target[rows]
    ignored = label == ignore_index
    grad = torch.where(ignored, 0, grad)
    grad_logits = grad_log_norm = None
    if needs_grad[0]:
        _, rival = pairs.classification_margin_rival_op(logits, target, None, rows, ignore_index)
        # The rival of an ignored row is class 0. With class 1 as its label, the two entries that
        # are written differ.
        pair = torch.stack((torch.where(ignored, 1, label), rival), 1)
        grad_logits = scatter_pair(pairs.normalize(grad, log_norm), pair, rows, logits)
    if needs_grad[1]:
        grad_log_norm = log_norm_gradient(grad, margin, label, ignore_index)
    return grad_logits, grad_log_norm


def log_norm_gradient(
    grad_margin: Tensor | None, margin: Tensor | None, target: Tensor, ignore_index: int
) -> Tensor | None:
    """The gradient of the margins in the log norm that scales them; None without margins."""
    if grad_margin is None or margin is None:
        return None
    return -torch.where(target == ignore_index, 0, grad_margin * margin).sum()


def boundary_gradient(
    grad: Tensor, score: Tensor | None, distance: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a score in ``f_i - f_j`` and in ``||w_i - w_j||^2 / 2``.

    The second is None if ``score`` is None. Both are 0 where the distance is 0.
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
    """Gradients of the scores of ``rows`` (all if None) in logits, weight and bias.

    ``score`` is needed only for the gradients in weight and bias.
    """
    logits, weight, bias = inputs
    pair, distance = pairs.minimal_margin_pair_op(logits.detach(), weight, bias, rows, nearest)
    slope, coefficient = boundary_gradient(grad, score, distance)
    grad_logits = grad_weight = grad_bias = None
    if needs_grad[0]:
        grad_logits = scatter_pair(slope, pair, rows, logits)
    if (needs_grad[1] or needs_grad[2]) and coefficient is not None:
        grad_weight, grad_bias = distance_gradient(coefficient, pair, weight, bias)
    return grad_logits, grad_weight, grad_bias if needs_grad[2] else None
