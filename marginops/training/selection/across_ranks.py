"""Selects the smallest scores of all processes of a group, for data-parallel training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ... import _checks as checks
from ...ops.arguments import as_k
from ...ops.exchange import RankArguments, exchange
from ...ops.select import check_k_after_skip, select_smallest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RankSelection(NamedTuple):
    """What a rank trains on, see :func:`select_across_ranks`.

    Attributes:
        indices: ``[m]`` int64, rows of the rank's own candidates: first those that are among the k,
            the closest first, and then rows that only fill up to ``least_rows``.
        weights: ``[m]``, the factor of each row's loss: R / k for R ranks, and 0 for filling rows.
        ids: ``[k]`` int64, the ids of the k selected candidates of all ranks, the same on every
            rank, in ascending order of their scores.
    """

    indices: Tensor
    weights: Tensor
    ids: Tensor


def select_across_ranks(
    scores: Tensor,
    k: int,
    *,
    ids: Tensor | None = None,
    skip: int = 0,
    least_rows: int = 2,
    group: "ProcessGroup | None" = None,
) -> RankSelection:
    """The k smallest scores among the candidates of all ranks, and each rank's share of them.

    Each rank scores candidates of its own, in any number. The k smallest of all may be spread over
    the ranks in any way, so the shares differ in size. :class:`DistributedDataParallel
    <torch.nn.parallel.DistributedDataParallel>` averages gradients over ranks. If every rank sums
    the losses of its rows times ``weights``, this average is the gradient of the mean loss of the k
    samples, as one process would compute it.

    A rank without any of the k samples still has to take part in the exchange of gradients. So each
    rank gets at least ``least_rows`` rows, of which the filling ones have weight 0. Their losses
    have to be finite. They do take part in the statistics of a batch norm.

    Args:
        scores: ``[B]``, B >= 1, the scores of this rank's candidates, for example of
            :func:`marginops.training.score_batch`. The dtype is the same on all ranks.
        k: How many candidates to select from all ranks together.
        ids: ``[B]`` int64, the ids of the candidates. By default the candidates are numbered from 0
            on through all ranks. If an id comes several times, each of its candidates counts.
        skip: How many of the smallest scores of all ranks to leave out before the k.
        least_rows: The least number of rows of each rank. Two are enough for batch norm. A rank
            with fewer candidates gets all.
        group: The processes. The default is the default group, or this process alone if there is
            none.

    Returns:
        :class:`RankSelection`, on the device of ``scores``. The order is that of
        :func:`marginops.select_smallest` for the scores of all ranks in the order of ranks: among
        equal scores the lowest rank comes first, and on the same rank the lowest row. NaN comes
        last.

    Raises:
        TypeError, ValueError: An argument of any rank has the wrong type, shape or range, or ranks
            differ in one. Then every rank raises, and no rank waits for another.

    The ranks exchange all scores and ids in their own dtypes, pickled, in one step, for which the
    call waits for the device. The result is deterministic. The step lasts as long as the rank with
    the most rows needs. If every rank can read any sample, rank r may train on ``ids[r::R]``
    instead: equal shares up to one sample, where each loss has the factor R / k.

    Example:
        >>> import torch
        >>> from marginops.training import select_across_ranks
        >>> selection = select_across_ranks(torch.tensor([3.0, 1.0, 2.0]), k=2)
        >>> selection.indices, selection.weights
        (tensor([1, 2]), tensor([0.5000, 0.5000]))
        >>> losses = torch.tensor([0.1, 0.2, 0.3])  # reduction="none"
        >>> loss = (losses[selection.indices] * selection.weights).sum()
    """

    def check() -> _Candidates:
        return _check(scores, k, ids, skip, least_rows)

    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    alone = group is None
    all_ranks = [check()] if alone else exchange(group, check)
    rank = 0 if alone else dist.get_rank(group)
    everything = torch.cat([candidates.scores for candidates in all_ranks])
    k = check_k_after_skip(k, skip, len(everything), "candidates of all ranks")
    order = select_smallest(everything, k, skip=skip).indices
    start = sum(len(candidates.scores) for candidates in all_ranks[:rank])
    own = all_ranks[rank].scores
    selected = order[(order >= start) & (order < start + len(own))] - start
    others = select_smallest(own, len(own)).indices
    others = others[~torch.isin(others, selected)]
    filling = others[: max(least_rows - len(selected), 0)]
    weights = torch.zeros(len(selected) + len(filling), dtype=checks.result_dtype(scores.dtype))
    weights[: len(selected)] = len(all_ranks) / max(k, 1)
    selected_ids = order
    if ids is not None:
        selected_ids = torch.cat([candidates.ids for candidates in all_ranks])[order]
    device = scores.device
    indices = torch.cat((selected, filling)).to(device)
    return RankSelection(indices, weights.to(device), selected_ids.to(device))


@dataclass(frozen=True)
class _Candidates(RankArguments):
    """The candidates of a rank, on the CPU.

    Attributes:
        scores: ``[B]``.
        ids: ``[B]`` int64, or ``[0]`` without ids.
    """

    scores: Tensor
    ids: Tensor


def _check(scores: Any, k: Any, ids: Any, skip: Any, least_rows: Any) -> _Candidates:
    checks.check_tensor("scores", scores, 1, "[B]")
    if len(scores) == 0:
        raise ValueError("scores: expected at least one candidate on each rank, got none")
    k = as_k(k)
    checks.check_int("k", k, 0)
    checks.check_int("skip", skip, 0)
    checks.check_int("least_rows", least_rows, 0)
    if ids is not None:
        _check_ids(ids, scores)
    must_agree = {
        "scores (dtype)": str(scores.dtype),
        "k": k,
        "skip": skip,
        "ids (given)": ids is not None,
    }
    own_ids = torch.zeros(0, dtype=torch.int64) if ids is None else ids.detach().cpu()
    return _Candidates(must_agree, scores.detach().cpu(), own_ids)


def _check_ids(ids: Any, scores: Tensor) -> None:
    expected = f"ids: expected an int64 tensor of shape {[*scores.shape]} as scores"
    if not isinstance(ids, Tensor):
        raise TypeError(f"{expected}, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{expected}, got {ids.dtype}; ids of another dtype may be rounded")
    if ids.shape != scores.shape:
        raise ValueError(f"{expected}, got {[*ids.shape]}")
