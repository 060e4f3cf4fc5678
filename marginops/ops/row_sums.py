"""Sums over rows of logits from which all statistics follow, computed piece by piece and merged.

A piece is a range of classes, for example one tile of the logits or the classes of one process.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import result_dtype
from . import margin_pair as pairs
from ._library import Op

# Replaces a target or rival that is not a class of the piece.
NOT_IN_PIECE = -1
# Replaces the target of an ignored row where targets are numbered within a piece.
IGNORED = -2


class RowSums(NamedTuple):
    """The largest logits of each row and sums over the row. All statistics follow from them.

    Attributes:
        values: ``[N, 6]``: the largest logit, the second largest logit, the logit of the target
            (0 if it is not in the piece), and the sums of ``exp(x)``, of ``exp(x) * x`` and of
            ``exp(x) ** 2``. Here x is the logit minus the largest logit. The sums leave out the
            class of the largest logit.
        classes: ``[N, 2]``, the classes of the two largest logits. The second is -1 if there is
            only one class.
    """

    values: Tensor
    classes: Tensor

    @property
    def has_nan(self) -> Tensor:
        """``[N]`` bool, true for the rows with a NaN."""
        return self.values[:, 0].isnan()


class StatisticsFields(NamedTuple):
    """The results of ``sample_statistics_op``, ``[N]`` each.

    The first fields are those of :class:`marginops.SampleStatistics`. The gradient needs
    ``maximum``, which is the largest logit, and ``log_sum``, which is the logarithm of the sum over
    all classes of ``exp(logit - maximum)``. The last two are 0-d: ``mean_loss`` is the mean loss of
    the samples that are not ignored, and ``num_counted`` is their number. If the mean is not asked
    for, they are empty.
    """

    margin: Tensor
    rival: Tensor
    top2_margin: Tensor
    loss: Tensor
    confidence: Tensor
    entropy: Tensor
    correct: Tensor
    el2n: Tensor
    gradient_norm: Tensor
    counted: Tensor
    maximum: Tensor
    log_sum: Tensor
    mean_loss: Tensor
    num_counted: Tensor


def classes_in_piece(classes: Tensor, piece: slice) -> Tensor:
    """Number the classes of a row from the start of a piece.

    A class outside the piece becomes NOT_IN_PIECE.
    """
    is_inside = (classes >= piece.start) & (classes < piece.stop)
    return torch.where(is_inside, classes - piece.start, NOT_IN_PIECE)


def merge(parts: list[RowSums]) -> RowSums:
    """Merge the sums of all pieces of the rows. Classes are numbered from the start of the row."""
    if len(parts) == 1:
        return parts[0]
    values, classes = map(torch.stack, zip(*parts, strict=True))
    none = torch.iinfo(torch.int64).max  # after all classes
    candidates = torch.where(classes < 0, none, classes).transpose(0, 1).flatten(1)
    candidates, order = candidates.sort(dim=1, stable=True)
    tops = values[:, :, :2].transpose(0, 1).flatten(1).gather(1, order)
    tops, order = tops.sort(dim=1, descending=True, stable=True)
    candidates = candidates.gather(1, order)
    maximum, leader = tops[:, 0], candidates[:, 0]

    first, own, others, weighted, squares = values[:, :, [0, 2, 3, 4, 5]].unbind(2)
    offset = torch.where(first == -torch.inf, -torch.inf, first - maximum)
    scale = offset.exp()
    # The sums of each piece leave out the largest logit of the piece. The sums of the row leave
    # out the largest logit of the row only, so the terms of the others are added here.
    left_out = (classes[:, :, 0] != leader).to(values.dtype)
    sums = (
        own,
        scale * (others + left_out),
        torch.where(scale == 0, 0, scale * (weighted + offset * (others + left_out))),
        scale.square() * (squares + left_out),
    )
    merged = torch.stack([tops[:, 0], tops[:, 1], *(part.sum(0) for part in sums)], 1)
    return RowSums(merged, candidates[:, :2])


def row_sums_reference(logits: Tensor, label: Tensor) -> RowSums:
    """Compute the sums from their definition. ``label`` is a class of the logits in every row."""
    values = logits.to(result_dtype(logits.dtype))
    nan = values.isnan().any(1)
    first = values.argmax(1)
    others = values.scatter(1, first.unsqueeze(1), -torch.inf)
    # With two classes or more, argmax returns the first class again only if all others are -inf.
    second = others.argmax(1) if logits.shape[1] > 1 else torch.full_like(first, -1)
    second = torch.where(second == first, (first == 0).to(torch.int64), second)
    maximum = torch.where(nan, torch.nan, values.amax(1))
    offset = others - maximum.unsqueeze(1)
    offset = torch.where(others == -torch.inf, -torch.inf, offset)
    term = offset.exp()
    weighted = torch.where(term == 0, 0, term * offset)
    second_value = others.amax(1) if logits.shape[1] > 1 else torch.full_like(maximum, -torch.inf)
    own = values.gather(1, label.unsqueeze(1)).squeeze(1)
    sums = term.sum(1), weighted.sum(1), term.square().sum(1)
    return RowSums(
        torch.stack((maximum, second_value, own, *sums), 1), torch.stack((first, second), 1)
    )


def finish(
    rows: RowSums,
    target: Tensor,
    ignored: Tensor,
    input_norm: Tensor | None,
    log_norm: Tensor | None,
) -> StatisticsFields:
    """Compute the statistics from the sums of the rows."""
    maximum, second, own, others, weighted, squares = rows.values.unbind(1)
    nan = rows.has_nan
    leads = rows.classes[:, 0] == target
    rival = torch.where(leads, rows.classes[:, 1], rows.classes[:, 0])
    rival = torch.where(nan, (target == 0).to(torch.int64), rival)
    margin = pairs.normalize(own - torch.where(leads, second, maximum), log_norm)

    unknown = ~maximum.isfinite()
    log_sum = torch.where(unknown, torch.nan, torch.log1p(others))
    total = 1 + others
    own_term = torch.exp(own - maximum)
    confidence = own_term / total
    entropy = log_sum - weighted / total
    el2n_if_largest = torch.sqrt(others.square() + squares) / total
    el2n_otherwise = torch.sqrt(
        ((squares - own_term.square()).clamp(min=0) + 1) / total.square() + (1 - confidence) ** 2
    )
    el2n = torch.where(leads, el2n_if_largest, el2n_otherwise)
    loss = log_sum - (own - maximum)
    loss, confidence, entropy, el2n = (
        torch.where(unknown, torch.nan, field) for field in (loss, confidence, entropy, el2n)
    )
    el2n = torch.where(ignored, 0, el2n)
    if input_norm is None:
        gradient_norm = el2n.new_empty(0)
    else:
        gradient_norm = torch.where(
            ignored, 0, el2n * torch.hypot(input_norm.new_ones(()), input_norm)
        )
    return StatisticsFields(
        margin=torch.where(ignored, torch.inf, torch.where(nan, torch.nan, margin)),
        rival=torch.where(ignored, 0, rival),
        top2_margin=torch.where(ignored, torch.inf, pairs.normalize(top_pair(rows)[1], log_norm)),
        loss=torch.where(ignored, 0, loss),
        confidence=torch.where(ignored, 1, confidence),
        entropy=torch.where(ignored, 0, entropy),
        correct=(leads & ~nan) | ignored,
        el2n=el2n,
        gradient_norm=gradient_norm,
        counted=~ignored,
        maximum=maximum.clone(),
        log_sum=log_sum,
        mean_loss=loss.new_empty(0),
        num_counted=loss.new_empty(0),
    )


def finish_exactly(
    rows: RowSums,
    target: Tensor,
    ignored: Tensor,
    input_norm: Tensor | None,
    log_norm: Tensor | None,
) -> StatisticsFields:
    """Compute the statistics, with margins that agree bit for bit with those of whole rows.

    The op for whole rows computes each margin from the two logits that it compares.
    """
    fields = finish(rows, target, ignored, input_norm, log_norm)
    maximum, second, own = rows.values[:, :3].unbind(1)
    own = torch.where(rows.has_nan, torch.nan, own)
    rival = torch.where(rows.classes[:, 0] == target, second, maximum)
    first = torch.where(ignored, IGNORED, 0)

    def exact(one: Tensor, other: Tensor) -> Tensor:
        logits = torch.stack((one, other), 1)
        return pairs.classification_margin_rival_op(logits, first, log_norm, None, IGNORED)[0]

    # Adding 0 makes +0.0 of -0.0, which is the difference of -0.0 and +0.0.
    return fields._replace(margin=exact(own, rival), top2_margin=exact(maximum, second) + 0)


def top_pair(rows: RowSums) -> tuple[Tensor, Tensor]:
    """The classes of the two largest logits, and the difference of these logits.

    In a row with a NaN the classes are 0 and 1, and the difference is NaN.
    """
    nan = rows.has_nan
    pair = torch.where(nan.unsqueeze(1), torch.arange(2, device=nan.device), rows.classes)
    difference = rows.values[:, 0] - rows.values[:, 1] + 0  # +0.0 for -0.0 and +0.0
    return pair, torch.where(nan, torch.nan, difference)


class RowSumsOp(Op):
    """The fields of :class:`RowSums`. Without ``with_sums`` the three sums are 0.

    ``target`` is a class of these logits, or any other number if it is not in this piece.
    """

    schema = "row_sums(Tensor logits, Tensor target, bool with_sums) -> (Tensor, Tensor)"
    row_arguments = ("logits", "target")

    @staticmethod
    def reference(logits: Tensor, target: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
        is_inside = (target >= 0) & (target < logits.shape[1])
        values, classes = row_sums_reference(logits, torch.where(is_inside, target, 0))
        values[:, 2] = torch.where(is_inside, values[:, 2], 0)
        if not with_sums:
            values[:, 3:] = 0
        return values, classes

    @staticmethod
    def fake(logits: Tensor, target: Tensor, with_sums: bool) -> tuple[Tensor, Tensor]:
        rows = logits.shape[0]
        return (
            logits.new_empty((rows, 6), dtype=result_dtype(logits.dtype)),
            logits.new_empty((rows, 2), dtype=torch.int64),
        )


row_sums_op = RowSumsOp()


def piece_sums(logits: Tensor, target: Tensor, piece: slice, with_sums: bool) -> RowSums:
    """The sums of a piece of the rows. Targets and classes are numbered from the start of the row.

    Without ``with_sums`` the three sums are 0.
    """
    values, classes = row_sums_op(logits, classes_in_piece(target, piece), with_sums)
    return RowSums(values, torch.where(classes < 0, classes, classes + piece.start))
