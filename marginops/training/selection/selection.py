"""Selects the samples to train on from a larger batch of candidates."""

from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks as checks
from ...ops.linear_score import linear_select_minimal_margin
from ...ops.margin import Rival
from ...ops.select import allowed_rows, check_k_after_skip, select_smallest
from ...ops.select_margin import select_minimal_margin
from .head_kinds import Head
from .scoring import evaluate, score_batch


def select_batch(
    network: nn.Module | None,
    inputs: Any,
    k: int,
    *,
    logits: Tensor | None = None,
    output: int | str | None = None,
    head: Head | None = None,
    weight: Tensor | None = None,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
    evaluation: bool = True,
    mask: Tensor | None = None,
    skip: int = 0,
    labels: Tensor | None = None,
    class_floor: int = 0,
) -> Tensor:
    """Select the k candidates with the smallest minimal margin score.

    The score is :func:`marginops.minimal_margin_score`. The function runs the network on all
    candidates, in evaluation mode and without gradient. Then it scores and selects in one fused
    call. Train on the selected candidates with a second forward pass. With B candidates and
    k = B / 10 this is the batch selection of Weinstein et al. (2020).

    Args:
        network: A network that returns logits ``[B, C]``, C >= 2, see
            :func:`marginops.networks.output_tensor`. It may return log-probabilities instead,
            because the score needs only differences of logits. With ``logits`` it may be None if
            ``head`` or ``weight`` is given.
        inputs: The B candidates: a tensor ``[B, ...]``, a mapping of keyword arguments, or a
            tuple or list of positional arguments of ``network``, on its device. They do not
            include the targets: of a batch ``(x, y)`` pass ``x``. None with ``logits``.
        k: How many candidates to select, 0 <= k <= B.
        logits: ``[B, C]``, the logits of the candidates where a loop has them already. Then the
            network does not run, and nothing checks that they follow from the weight.
        output: The place of the logits in the output of ``network``, if it returns more: a position
            in a tuple, a key of a mapping or the name of an attribute.
        head: The layer that computes the logits, as ``F.linear(features, weight, bias)``: a
            :class:`torch.nn.Linear`, a convolution with kernel size 1, whose outputs may be
            averaged over positions, or a :class:`torch.nn.Embedding` whose weight is multiplied
            with the features. A linear layer may have LoRA of PEFT: then its weight with the active
            adapters counts. The default is the one whose size fits: the linear layer that
            :func:`marginops.networks.last_linear` finds, among those that the network calls if
            there are adapters, or the only such convolution, or the only embedding.
        weight: ``[C, D]``, the weight whose distances between rows divide the differences of
            logits, for a network whose logits come from another kind of layer. By
            default it is the weight of ``head``. The function cannot see that a square weight is
            transposed.
        rival: ``"top2"`` or ``"nearest"``, see :func:`marginops.minimal_margin_score`.
        bias_in_norm: Count the bias of ``head`` as one more column of its weight in the norm.
        evaluation: Run the network in evaluation mode. With False every module keeps its mode, so
            that batch norm uses the statistics of the candidates and dropout is active.
        mask: ``[B]`` bool, True where a candidate may be selected. By default all may.
        skip: How many of the closest candidates to leave out, for example because their labels may
            be wrong. The function selects the k that follow them.
        labels: ``[B]`` int64, the class of each candidate, for ``class_floor``.
        class_floor: How many candidates of each class to prefer. Of the candidates that ``mask``
            and ``skip`` leave, the closest ``class_floor`` of each class come before all others,
            and then the closest. If these are more than k, the closest k of them are selected.

    Returns:
        ``[k]`` int64 on the device of the logits, rows of ``inputs``. The closest candidate comes
        first, and among equal scores the one with the lowest index.

    Raises:
        TypeError, ValueError: The output of ``network`` is not ``[B, C]``, the last layer is not
            clear, the logits do not follow from its weight, fewer than ``skip + k`` candidates may
            be selected, or an argument has the wrong type, shape or range.

    A :class:`torch.nn.Sequential` that ends with a linear ``head`` runs without this layer, and
    :func:`marginops.linear_select_minimal_margin` selects from the features. Any other network
    runs as a whole, and :func:`marginops.select_minimal_margin` selects from the logits. For given
    outputs of the network the selection is deterministic.

    The first call for such a network and head checks that the logits equal
    ``F.linear(features, head.weight, head.bias)`` up to rounding and to a constant in each row. It
    also runs the network with other values of the other parameters that require a gradient, because
    an adapter or a learned scale may have no effect before training. The network is not changed for
    this. So the first call waits for the device, runs the network two or three times, and needs
    memory for one more copy of these parameters. Later calls do not check again, except if the head
    has been wrapped, hooked or replaced. So what is frozen in the first call and trained later is
    not seen. With ``weight`` there is no check.

    The mode (training or evaluation) of every module is restored, also after an error. Running
    statistics and random number generators do not change, whatever ``evaluation`` is. Apart from
    the check and from ``mask`` the function does not wait for the device.

    Example:
        >>> import torch
        >>> from marginops.training import select_batch
        >>> network = torch.nn.Linear(2, 2, bias=False)
        >>> _ = network.weight.data.copy_(torch.eye(2))
        >>> candidates = torch.tensor([[2.0, 0.5], [0.1, 0.0], [3.0, 2.0]])
        >>> chosen = select_batch(network, candidates, k=2)
        >>> chosen
        tensor([1, 2])
        >>> loss = torch.nn.functional.cross_entropy(network(candidates[chosen]), chosen - 1)
    """
    checks.check_int("class_floor", class_floor, 0)
    if (class_floor > 0) != (labels is not None):
        other = "labels" if labels is None else "class_floor"
        raise ValueError(f"{other}: expected labels and class_floor together, got one of them")
    options: Any = {"rival": rival, "bias_in_norm": bias_in_norm}
    if mask is not None or labels is not None:
        places: Any = {"logits": logits, "output": output, "head": head, "weight": weight}
        scores = score_batch(network, inputs, **places, **options, evaluation=evaluation)
        if labels is None:
            return select_smallest(scores, k, mask=mask, skip=skip).indices
        return _select_with_floors(scores, k, mask, skip, labels, class_floor)

    def total(count: int) -> int:
        return check_k_after_skip(k, skip, count, "candidates") + skip

    def of_features(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        chosen = linear_select_minimal_margin(
            features, weight, bias, k=total(features.shape[0]), **options
        )
        return chosen.indices

    def of_logits(logits: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        chosen = select_minimal_margin(logits, weight, bias, k=total(logits.shape[0]), **options)
        return chosen.indices

    source = logits, output, head, weight, bias_in_norm, evaluation
    return evaluate(network, inputs, *source, of_features, of_logits)[skip:]


def _select_with_floors(
    scores: Tensor, k: int, mask: Tensor | None, skip: int, labels: Any, floor: int
) -> Tensor:
    """See ``class_floor`` of :func:`select_batch`. Does not wait for the device without a mask."""
    checks.check_target(labels, scores, -100, "scores", "labels")
    count, counted = scores.shape[0], "candidates"
    if mask is not None:
        count, counted = allowed_rows(mask, scores).shape[0], "candidates that mask allows"
    k = check_k_after_skip(k, skip, count, counted)
    order = select_smallest(scores, count - skip, mask=mask, skip=skip).indices
    is_among_first = _rank_in_class(labels[order]) < floor
    # A stable order keeps the closest first, before and after.
    preferred = torch.argsort(~is_among_first, stable=True)[:k]
    return order[preferred.sort().values]


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many earlier labels each label equals."""
    by_class = torch.argsort(labels, stable=True)
    position = torch.arange(len(labels), device=labels.device)
    sorted_labels = labels[by_class]
    starts = torch.ones_like(sorted_labels, dtype=torch.bool)
    starts[1:] = sorted_labels[1:] != sorted_labels[:-1]
    first = torch.where(starts, position, 0).cummax(0).values
    return torch.empty_like(position).scatter(0, by_class, position - first)
