"""Choosing the samples to train on from a larger batch of candidates."""

from typing import Any

import torch
from torch import Tensor, nn

from ..networks import call, evaluation_mode, last_linear, output_tensor
from ..ops.linear_select import linear_select_minimal_margin
from ..ops.margin import Rival
from ..ops.select import select_minimal_margin


def select_batch(
    network: nn.Module,
    inputs: Any,
    k: int,
    *,
    head: nn.Linear | None = None,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
) -> Tensor:
    """The k candidates closest to a decision boundary of the network.

    Runs the network on all candidates in evaluation mode and without gradient, then scores and
    selects in one fused call: a :class:`torch.nn.Sequential` that ends with its head only up to
    there, for :func:`marginops.linear_select_minimal_margin`; any other network as a whole, for
    :func:`marginops.select_minimal_margin`. Train on the chosen candidates with a second forward
    pass; with B candidates and k = B / 10 this is the batch selection of Weinstein et al. (2020).

    Args:
        network: Returns logits ``[B, C]``, C >= 2, as a tensor or in the attribute ``logits`` of
            its output. Log-probabilities do as well: only differences count.
        inputs: The B candidates: a tensor ``[B, ...]``, a mapping of keyword arguments, or a
            tuple or list of positional arguments of ``network``, on its device.
        k: How many, 0 <= k <= B.
        head: The layer that computes the logits; by default :func:`marginops.networks.last_linear`.
        rival: ``"top2"`` or ``"nearest"``, see :func:`marginops.minimal_margin_score`.
        bias_in_norm: Count the bias of ``head`` as one more column of its weight in the norm.

    Returns:
        ``[k]`` int64 on the device of the logits: rows of ``inputs``, closest first, equal
        scores by lowest index.

    Raises:
        TypeError, ValueError: The output of ``network`` is not ``[B, C]``, its head cannot be
            told, or an argument has the wrong type, shape or range.

    The mode (training or evaluation) of every module is restored, also after an error; running
    statistics and random number generators stay as they are. Does not wait for the device.

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
    if head is not None and not isinstance(head, nn.Linear):
        raise TypeError(f"head: expected a torch.nn.Linear, got {type(head).__name__}")
    with evaluation_mode(network), torch.no_grad():
        if parts := _body_and_head(network, head):
            body, head = parts
            features = output_tensor(call(body, inputs), "features", "[B, D]")
            return linear_select_minimal_margin(
                features, head.weight, head.bias, k=k, rival=rival, bias_in_norm=bias_in_norm
            ).indices
        logits = output_tensor(call(network, inputs))
        head = head or last_linear(network, logits.shape[1])
        bias = head.bias if bias_in_norm else None
        return select_minimal_margin(
            logits, head.weight, k, bias, rival=rival, bias_in_norm=bias_in_norm
        ).indices


def _body_and_head(
    network: nn.Module, head: nn.Linear | None
) -> tuple[nn.Sequential, nn.Linear] | None:
    """A network whose output is that of its head, in two; subclasses may do more than that."""
    if type(network) is not nn.Sequential or len(network) < 2:
        return None
    last = network[-1]
    if type(last) is not nn.Linear or head not in (None, last):
        return None
    if not (_is_plain(network) and _is_plain(last)):
        return None
    return nn.Sequential(*list(network)[:-1]), last


def _is_plain(module: nn.Module) -> bool:
    """Whether a call does what its class says; hooks (of pruning, say) and patches do more."""
    hooks = module._forward_pre_hooks or module._forward_hooks
    return not hooks and "forward" not in vars(module)
