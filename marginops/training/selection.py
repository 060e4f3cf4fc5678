"""Selects the samples to train on from a larger batch of candidates."""

from typing import Any

import torch
from torch import Tensor, nn

from ..networks import call, evaluation_mode, last_linear, output_tensor, unwrap
from ..ops.linear_select import linear_select_minimal_margin
from ..ops.margin import Rival
from ..ops.select import select_minimal_margin
from .heads import can_read, check_head, check_head_type, fitting_weight, is_checked


def select_batch(
    network: nn.Module,
    inputs: Any,
    k: int,
    *,
    head: nn.Linear | None = None,
    weight: Tensor | None = None,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
) -> Tensor:
    """Select the k candidates with the smallest minimal margin score.

    The score is :func:`marginops.minimal_margin_score`. The function runs the network on all
    candidates, in evaluation mode and without gradient. Then it scores and selects in one fused
    call. Train on the selected candidates with a second forward pass. With B candidates and
    k = B / 10 this is the batch selection of Weinstein et al. (2020).

    Args:
        network: A network that returns logits ``[B, C]``, C >= 2, see
            :func:`marginops.networks.output_tensor`. It may return log-probabilities instead,
            because the score needs only differences of logits.
        inputs: The B candidates: a tensor ``[B, ...]``, a mapping of keyword arguments, or a
            tuple or list of positional arguments of ``network``, on its device. They do not
            include the targets: of a batch ``(x, y)`` pass ``x``.
        k: How many candidates to select, 0 <= k <= B.
        head: The layer that computes the logits, as ``F.linear(features, weight, bias)``. The
            default is the one that :func:`marginops.networks.last_linear` finds.
        weight: ``[C, D]``, the weight whose distances between rows divide the differences of
            logits, for a network whose logits do not come from a :class:`torch.nn.Linear`. By
            default it is the weight of ``head``. The function cannot see that a square weight is
            transposed.
        rival: ``"top2"`` or ``"nearest"``, see :func:`marginops.minimal_margin_score`.
        bias_in_norm: Count the bias of ``head`` as one more column of its weight in the norm.

    Returns:
        ``[k]`` int64 on the device of the logits, rows of ``inputs``. The closest candidate comes
        first, and among equal scores the one with the lowest index.

    Raises:
        TypeError, ValueError: The output of ``network`` is not ``[B, C]``, the last layer is not
            clear, the logits do not follow from its weight, or an argument has the wrong type,
            shape or range.

    A :class:`torch.nn.Sequential` that ends with ``head`` runs without this layer, and
    :func:`marginops.linear_select_minimal_margin` selects from the features. Any other network
    runs as a whole, and :func:`marginops.select_minimal_margin` selects from the logits. For given
    outputs of the network the selection is deterministic.

    The first call for such a network and head checks that the logits equal
    ``F.linear(features, head.weight, head.bias)`` up to rounding and to a constant in each row. For
    this the call waits for the device, and without ``head`` it runs the network twice. Later calls
    do not check again, except if the head has been wrapped, hooked or replaced. So a change that
    starts later, such as an adapter whose weights are still 0 in the first call, is not seen. With
    ``weight`` there is no check.

    The mode (training or evaluation) of every module is restored, also after an error. Running
    statistics and random number generators do not change. Apart from the check the function does
    not wait for the device.

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
    check_head_type(head)
    if weight is not None and (head is not None or bias_in_norm):
        other = "head=None" if head is not None else "bias_in_norm=False"
        raise ValueError(
            f"weight: expected {other} with weight=, got both; to count a bias, append it to "
            "weight as one more column"
        )
    with evaluation_mode(network), torch.no_grad():
        if weight is None and (parts := _body_and_head(network, head)):
            body, head = parts
            features = output_tensor(call(body, inputs), "features", "[B, D]")
            return linear_select_minimal_margin(
                features, head.weight, head.bias, k=k, rival=rival, bias_in_norm=bias_in_norm
            ).indices
        if head is None or is_checked(network, head):
            logits = output_tensor(call(network, inputs))
        else:
            logits = check_head(network, inputs, head)
        bias: Tensor | None = None
        if weight is None:
            if head is None:
                head = last_linear(unwrap(network), logits.shape[1])
                if can_read(logits) and not is_checked(network, head):
                    check_head(network, inputs, head)
            weight, bias = head.weight, head.bias if bias_in_norm else None
        weight = fitting_weight(weight, logits)
        bias = None if bias is None else bias.to(weight.dtype)
        return select_minimal_margin(
            logits, weight, bias, k=k, rival=rival, bias_in_norm=bias_in_norm
        ).indices


def _body_and_head(
    network: nn.Module, head: nn.Linear | None
) -> tuple[nn.Sequential, nn.Linear] | None:
    """Split a network that only applies a body and then its head; None for any other network.

    A subclass of ``torch.nn.Sequential`` may do more, so it is not split.
    """
    if type(network) is not nn.Sequential or len(network) < 2:
        return None
    last = network[-1]
    if type(last) is not nn.Linear or head not in (None, last):
        return None
    if not (_is_plain(network) and _is_plain(last)):
        return None
    return nn.Sequential(*list(network)[:-1]), last


def _is_plain(module: nn.Module) -> bool:
    """Whether a call runs only the forward of the class: no hooks (as of pruning), no patches."""
    hooks = module._forward_pre_hooks or module._forward_hooks
    return not hooks and "forward" not in vars(module)
