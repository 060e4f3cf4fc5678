"""Scores a batch with the user's network: finds its logits and the weight that they follow from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...networks import call, check_network, evaluation_mode, output_tensor, unwrap
from ...ops.linear_score import linear_minimal_margin_score
from ...ops.margin import Rival, minimal_margin_score
from .head_kinds import Head, check_any_head, find_head, fitting_weight, head_bias, head_weight
from .heads import can_read, check_head, is_checked

Result = TypeVar("Result")


def score_batch(
    network: nn.Module | None,
    inputs: Any = None,
    *,
    logits: Tensor | None = None,
    output: int | str | None = None,
    head: Head | None = None,
    weight: Tensor | None = None,
    rival: Rival = "top2",
    bias_in_norm: bool = False,
    evaluation: bool = True,
) -> Tensor:
    """The minimal margin scores of a batch, from the network that classifies it.

    Use it where :func:`marginops.training.select_batch` does not fit: to select over several ranks
    with :func:`marginops.training.select_across_ranks`, or with scores of several batches.

    Args:
        network: See :func:`marginops.training.select_batch`, as for all arguments.
        inputs: The batch.
        logits: Logits that are there already, in place of ``inputs``.
        output: The place of the logits in the output of ``network``.
        head: The layer that computes the logits.
        weight: The weight that the logits follow from.
        rival: ``"top2"`` or ``"nearest"``.
        bias_in_norm: Count the bias of ``head`` in the norm.
        evaluation: Run ``network`` in evaluation mode.

    Returns:
        ``[B]``, float64 for float64 logits, else float32, in units of the features, without a
        gradient.

    Raises:
        TypeError, ValueError: As :func:`marginops.training.select_batch`.

    Example:
        >>> import torch
        >>> from marginops.training import score_batch
        >>> network = torch.nn.Linear(2, 2, bias=False)
        >>> _ = network.weight.data.copy_(torch.eye(2))
        >>> score_batch(network, torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([1.4142, 0.7071])
    """
    options: Any = {"rival": rival, "bias_in_norm": bias_in_norm}

    def of_features(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_minimal_margin_score(features, weight, bias, **options)

    def of_logits(logits: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return minimal_margin_score(logits, weight, bias, **options)

    source = logits, output, head, weight, bias_in_norm, evaluation
    return evaluate(network, inputs, *source, of_features, of_logits)


def evaluate(
    network: nn.Module | None,
    inputs: Any,
    logits: Tensor | None,
    output: int | str | None,
    head: Head | None,
    weight: Tensor | None,
    bias_in_norm: bool,
    evaluation: bool,
    of_features: Callable[[Tensor, Tensor, Tensor | None], Result],
    of_logits: Callable[[Tensor, Tensor, Tensor | None], Result],
) -> Result:
    """Call ``of_features`` or ``of_logits`` with features or logits, weight and bias."""
    check_any_head(head)
    if weight is not None and (head is not None or bias_in_norm):
        other = "head=None" if head is not None else "bias_in_norm=False"
        raise ValueError(
            f"weight: expected {other} with weight=, got both; to count a bias, append it to "
            "weight as one more column"
        )
    if logits is not None:
        return _evaluate_logits(network, inputs, logits, head, weight, bias_in_norm, of_logits)
    check_network(network)
    assert network is not None
    with scoring_mode(network, evaluation), torch.no_grad():
        if weight is None and output is None and (parts := _body_and_head(network, head)):
            body, linear = parts
            features = output_tensor(call(body, inputs), "features", "[B, D]")
            return of_features(features, linear.weight, linear.bias)
        known: Tensor | None = None
        if head is not None and not is_checked(network, head):
            known = check_head(network, inputs, head, output)
        if known is None or not evaluation:
            known = output_tensor(call(network, inputs), at=output)
        if weight is None and head is None:
            head = find_head(unwrap(network), known.shape[1])
            if can_read(known) and not is_checked(network, head):
                check_head(network, inputs, head, output)
        return of_logits(known, *_weight_and_bias(known, head, weight, bias_in_norm))


def _evaluate_logits(
    network: nn.Module | None,
    inputs: Any,
    logits: Tensor,
    head: Head | None,
    weight: Tensor | None,
    bias_in_norm: bool,
    of_logits: Callable[[Tensor, Tensor, Tensor | None], Result],
) -> Result:
    if inputs is not None:
        raise ValueError(
            f"inputs: expected None with logits=, got {type(inputs).__name__}; pass one of them"
        )
    logits = output_tensor(logits)
    if weight is None and head is None:
        if network is None:
            raise ValueError(
                "network: expected a torch.nn.Module, or head= or weight= beside logits=, got None"
            )
        head = find_head(unwrap(network), logits.shape[1])
    with torch.no_grad():
        return of_logits(logits.detach(), *_weight_and_bias(logits, head, weight, bias_in_norm))


def _weight_and_bias(
    logits: Tensor, head: Head | None, weight: Tensor | None, bias_in_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """The weight in a dtype that fits the logits, and the bias if it counts."""
    bias: Tensor | None = None
    if weight is None:
        assert head is not None
        weight, bias = head_weight(head), head_bias(head) if bias_in_norm else None
    weight = fitting_weight(weight, logits)
    return weight, None if bias is None else bias.to(weight.dtype)


@contextmanager
def scoring_mode(network: nn.Module, evaluation: bool) -> Iterator[None]:
    """Run a network in evaluation mode, or as it is; at the end everything is as before.

    In training mode a forward pass changes running statistics and other buffers, and draws random
    numbers. Both are restored.
    """
    if evaluation:
        with evaluation_mode(network):
            yield
        return
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {parameter.device for parameter in network.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer.copy_(value)


def _body_and_head(network: nn.Module, head: Head | None) -> tuple[nn.Sequential, nn.Linear] | None:
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
