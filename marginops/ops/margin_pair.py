"""The pair of classes that a margin or score compares, for gradients and linear heads."""

from typing import Any

import torch
from torch import Tensor

from .._checks import result_dtype
from ._batches import Batch
from ._library import Op
from .arguments import checked_target


def normalize(margin: Tensor, log_norm: Tensor | None) -> Tensor:
    """``margin * exp(-log_norm)``, as two finite factors ``exp(-log_norm / 2)``."""
    if log_norm is None:
        return margin
    half = torch.exp(-log_norm / 2).clamp(max=torch.finfo(margin.dtype).max)
    return margin * half * half


def normalize_batch(margin: Tensor, batch: Batch) -> Tensor:
    """Scale margins ``[E, N]`` by the log norm of each element of a batch of ``torch.vmap``."""
    ignored = batch.values["target"] == batch.values["ignore_index"]
    # The infinite margins of ignored rows would make the gradient of the log norm NaN.
    margin = torch.where(ignored, 0, margin)
    scaled = normalize(margin, batch.values["log_norm"].unsqueeze(1))
    return torch.where(ignored, torch.inf, scaled)


def boundary_distance(difference: Tensor, weight_distance: Tensor) -> Tensor:
    """``difference / weight_distance``, where 0 / 0 is 0."""
    is_zero = (difference == 0) & (weight_distance == 0)
    return torch.where(is_zero, 0, difference / weight_distance)


def _rival_class(logits: Tensor, target: Tensor) -> Tensor:
    """``argmax over c != target`` of the logits; the lowest class among ties."""
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf)
    rival = others.argmax(1)
    # argmax returns the target only if the target is class 0 and all logits are -inf now.
    return torch.where(rival == target, (target == 0).to(torch.int64), rival)


class ClassificationMarginRivalOp(Op):
    """Margin and rival of ``rows`` of the logits, of all rows if ``rows`` is None."""

    schema = (
        "classification_margin_rival(Tensor logits, Tensor target, Tensor? log_norm,"
        " Tensor? rows, int ignore_index) -> (Tensor, Tensor)"
    )
    row_arguments = ("logits", "target")

    def call_batch(self, batch: Batch) -> Any:
        """Only all rows of each element can be joined."""
        return super().call_batch(batch) if batch.values["rows"] is None else None

    @staticmethod
    def reference(
        logits: Tensor,
        target: Tensor,
        log_norm: Tensor | None,
        rows: Tensor | None,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor]:
        if rows is not None:
            logits, target = logits[rows], target[rows]
        ignored, label = checked_target(target, logits.shape[1], ignore_index)
        nan = logits.isnan().any(1)
        rival = torch.where(nan, (label == 0).long(), _rival_class(logits, label))
        pair = torch.stack((label, rival), 1)
        own, other = logits.gather(1, pair).to(result_dtype(logits.dtype)).unbind(1)
        margin = torch.where(nan, torch.nan, normalize(own - other, log_norm))
        return torch.where(ignored, torch.inf, margin), torch.where(ignored, 0, rival)

    @staticmethod
    def fake(
        logits: Tensor, target: Tensor, log_norm: Tensor | None, rows: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        rival = torch.empty_like(target if rows is None else rows)
        return torch.empty_like(rival, dtype=result_dtype(logits.dtype)), rival


classification_margin_rival_op = ClassificationMarginRivalOp()


class PairDistanceOp(Op):
    """``||w_i - w_j||`` of pairs of rows of the weight. A bias counts as one more column."""

    schema = "pair_distance(Tensor weight, Tensor? bias, Tensor pair) -> Tensor"

    @staticmethod
    def reference(weight: Tensor, bias: Tensor | None, pair: Tensor) -> Tensor:
        """Divide by the largest entry first, so that no square overflows or underflows."""
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

    @staticmethod
    def fake(weight: Tensor, bias: Tensor | None, pair: Tensor) -> Tensor:
        return weight.new_empty((pair.shape[0],), dtype=result_dtype(weight.dtype))


pair_distance_op = PairDistanceOp()


class MinimalMarginPairOp(Op):
    """The pair of classes of the score and the distance of their rows of the weight.

    The op computes them for ``rows`` of the logits, for all rows if ``rows`` is None.
    """

    schema = (
        "minimal_margin_pair(Tensor logits, Tensor weight, Tensor? bias, Tensor? rows,"
        " bool nearest) -> (Tensor, Tensor)"
    )
    row_arguments = ("logits",)

    def call_batch(self, batch: Batch) -> Any:
        """Only all rows of each element can be joined."""
        return super().call_batch(batch) if batch.values["rows"] is None else None

    @staticmethod
    def reference(
        logits: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, nearest: bool
    ) -> tuple[Tensor, Tensor]:
        if rows is not None:
            logits = logits[rows]
        nan = logits.isnan().any(1)
        first = logits.argmax(1)
        second = _rival_class(logits, first)
        if nearest:
            # One row at a time, because a table of all distances would need [C, C].
            for row, best in enumerate(first.tolist()):
                others = torch.arange(logits.shape[1], device=logits.device)
                others = others[others != best]
                candidates = torch.stack((torch.full_like(others, best), others), 1)
                values = logits[row].to(result_dtype(logits.dtype))
                quotient = boundary_distance(
                    values[best] - values[others],
                    pair_distance_op.reference(weight, bias, candidates),
                )
                second[row] = others[quotient.argmin()]
        pair = torch.stack((first, second), 1)
        pair[nan] = torch.tensor([0, 1], device=pair.device)
        distance = pair_distance_op.reference(weight, bias, pair).to(result_dtype(logits.dtype))
        return pair, torch.where(nan, torch.nan, distance)

    @staticmethod
    def fake(
        logits: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        count = logits.shape[0] if rows is None else rows.shape[0]
        return (
            logits.new_empty((count, 2), dtype=torch.int64),
            logits.new_empty((count,), dtype=result_dtype(logits.dtype)),
        )


minimal_margin_pair_op = MinimalMarginPairOp()
