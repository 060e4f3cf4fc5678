"""Runs anybody's network: wrapped or not, on any form of batch, and leaves it as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_int

__all__ = [
    "call",
    "evaluation_mode",
    "features_and_logits",
    "last_linear",
    "output_tensor",
    "predict",
    "unwrap",
]


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network in evaluation mode, and every module back into its own mode at the end.

    Unlike ``network.eval()`` followed by ``network.train()``, layers that were frozen in
    evaluation mode stay frozen.

    Args:
        network: Any module.

    Example:
        >>> import torch
        >>> from marginops.networks import evaluation_mode
        >>> network = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout().eval())
        >>> with evaluation_mode(network):
        ...     [module.training for module in network]
        [False, False]
        >>> [module.training for module in network]
        [True, False]
    """
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        yield
    finally:
        for module in training:
            module.training = True


def unwrap(network: nn.Module) -> nn.Module:
    """The user's own module inside ``torch.compile`` and the data-parallel wrappers.

    Args:
        network: Any module, perhaps wrapped, in any order and depth, by :func:`torch.compile`,
            :class:`torch.nn.parallel.DistributedDataParallel` or :class:`torch.nn.DataParallel`.

    Returns:
        The innermost module. It shares its parameters with ``network``.

    Example:
        >>> import torch
        >>> from marginops.networks import unwrap
        >>> network = torch.nn.Linear(4, 3)
        >>> unwrap(torch.nn.DataParallel(network)) is network
        True
    """
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(inner := network._modules.get("_orig_mod"), nn.Module):
            network = inner  # of the module that torch.compile returns
        else:
            return network


def last_linear(network: nn.Module, num_classes: int) -> nn.Linear:
    """The linear layer of the network that has ``num_classes`` outputs.

    Args:
        network: Any module; all of its submodules are walked.
        num_classes: C, the number of logits.

    Returns:
        The layer, weight ``[C, D]``.

    Raises:
        ValueError: No layer fits, or several do and only the caller can tell which one computes
            the logits.

    Example:
        >>> import torch
        >>> from marginops.networks import last_linear
        >>> last_linear(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3)), 3)
        Linear(in_features=4, out_features=3, bias=True)
    """
    linears = {
        name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)
    }
    fitting = [name for name, layer in linears.items() if layer.weight.shape[0] == num_classes]
    if len(fitting) == 1:
        return linears[fitting[0]]
    if fitting:
        problem = f"several linear layers have {num_classes} outputs ({', '.join(fitting)})"
    else:
        widths = ", ".join(f"{name}: {layer.out_features}" for name, layer in linears.items())
        problem = f"no linear layer has {num_classes} outputs (linear layers: {widths or 'none'})"
    raise ValueError(
        f"network: {problem}; pass head=, the torch.nn.Linear that computes the logits"
    )


def call(network: nn.Module, inputs: Any) -> Any:
    """The output of a network for a batch of any of the usual forms.

    Args:
        network: Any module.
        inputs: A tensor, a mapping of keyword arguments, or a tuple or list of positional
            arguments.

    Example:
        >>> import torch
        >>> from marginops.networks import call
        >>> call(torch.nn.Linear(4, 3), {"input": torch.zeros(2, 4)}).shape
        torch.Size([2, 3])
    """
    if isinstance(inputs, Mapping):
        return network(**inputs)
    if isinstance(inputs, (tuple, list)):
        return network(*inputs)
    return network(inputs)


def output_tensor(output: Any, name: str = "logits", shape: str = "[B, C]") -> Tensor:
    """The matrix in a network's output: the output itself or its attribute ``logits``.

    Args:
        output: What a network returned.
        name: What the matrix is called in errors.
        shape: Its shape in errors.

    Raises:
        TypeError: There is no tensor.
        ValueError: The tensor does not have two dimensions.

    Example:
        >>> import types, torch
        >>> from marginops.networks import output_tensor
        >>> output_tensor(types.SimpleNamespace(logits=torch.zeros(2, 3))).shape
        torch.Size([2, 3])
    """
    result = getattr(output, "logits", output)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"network: expected {name} {shape} as its output or as the attribute 'logits' of its "
            f"output, got {type(output).__name__}"
        )
    if result.dim() != 2:
        raise ValueError(f"network: expected {name} of shape {shape}, got {list(result.shape)}")
    return result


def features_and_logits(network: nn.Module, inputs: Any, head: nn.Linear) -> tuple[Tensor, Tensor]:
    """What the last layer gets and what comes out, in evaluation mode and without gradient.

    A hook on ``head`` catches its input. It would not run in a compiled graph, so the network
    runs unwrapped and eagerly.

    Args:
        network: Returns logits ``[B, C]``, as a tensor or in the attribute ``logits``.
        inputs: A batch, see :func:`call`.
        head: The layer of ``network`` that computes the logits, see :func:`last_linear`.

    Returns:
        Features ``[B, D]`` and logits ``[B, C]``.

    Raises:
        TypeError, ValueError: The output is not ``[B, C]``, or ``head`` was not called exactly
            once, with features ``[B, D]``.

    Example:
        >>> import torch
        >>> from marginops.networks import features_and_logits
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
        >>> features, logits = features_and_logits(network, torch.zeros(2, 8), network[1])
        >>> features.shape, logits.shape
        (torch.Size([2, 4]), torch.Size([2, 3]))
    """
    network = unwrap(network)
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        caught.append(arguments[0] if arguments else keywords["input"])

    hook = head.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with evaluation_mode(network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = output_tensor(call(network, inputs))
    finally:
        hook.remove()
    if len(caught) != 1:
        raise ValueError(
            f"head: expected network to call this layer once in a forward pass, "
            f"got {len(caught)} calls"
        )
    (features,) = caught
    if features.dim() != 2:
        raise ValueError(
            f"head: expected network to call this layer with features of shape [B, D], "
            f"got {list(features.shape)}"
        )
    return features, logits


def predict(network: nn.Module, inputs: Tensor, *, chunk_size: int = 4096) -> Tensor:
    """Logits of all inputs, in evaluation mode and without gradient.

    Args:
        network: Maps ``[B, ...]`` to logits ``[B, C]``, as a tensor or in the attribute
            ``logits``.
        inputs: ``[N, ...]``, N >= 1, on the device of ``network``.
        chunk_size: Inputs in one forward pass.

    Returns:
        ``[N, C]``.

    Raises:
        TypeError, ValueError: The output of ``network`` is not ``[B, C]``, or ``chunk_size`` is
            not a positive int.

    Example:
        >>> import torch
        >>> from marginops.networks import predict
        >>> predict(torch.nn.Linear(4, 3), torch.zeros(10, 4)).shape
        torch.Size([10, 3])
    """
    check_int("chunk_size", chunk_size, 1)
    with evaluation_mode(network), torch.no_grad():
        return torch.cat([output_tensor(network(chunk)) for chunk in inputs.split(chunk_size)])
