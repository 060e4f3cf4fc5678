"""Runs the user's network, wrapped or not, on any form of batch. The network keeps its state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import _advice as advice
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


def check_network(network: Any) -> None:
    """Check that the network is a module."""
    if not isinstance(network, nn.Module):
        is_class = isinstance(network, type)
        kind = f"the class {network.__name__}" if is_class else type(network).__name__
        todo = "; pass an instance of it" if is_class else ""
        if isinstance(network, torch.export.ExportedProgram):
            todo = "; pass network.module()"
        raise TypeError(f"network: expected a torch.nn.Module, got {kind}{todo}")


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network in evaluation mode, and restore the mode of every module at the end.

    ``network.eval()`` followed by ``network.train()`` would put all modules in training mode. This
    context keeps a module in evaluation mode if it was in evaluation mode before, for example a
    frozen layer. It also restores the modes after an error.

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
    check_network(network)
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        yield
    finally:
        for module in training:
            module.training = True


def unwrap(network: nn.Module) -> nn.Module:
    """The module inside the wrappers of ``torch.compile`` and of data parallelism.

    Args:
        network: Any module. It may have wrappers of :func:`torch.compile`,
            :class:`torch.nn.parallel.DistributedDataParallel` and :class:`torch.nn.DataParallel`,
            several and in any order.

    Returns:
        The innermost module. It shares its parameters with ``network``.

    Example:
        >>> import torch
        >>> from marginops.networks import unwrap
        >>> network = torch.nn.Linear(4, 3)
        >>> unwrap(torch.nn.DataParallel(network)) is network
        True
    """
    check_network(network)
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif "_orig_mod" in network._modules:
            # torch.compile keeps the original module under this name.
            network = cast(nn.Module, network._modules["_orig_mod"])
        else:
            return network


def last_linear(network: nn.Module, num_classes: int) -> nn.Linear:
    """The linear layer of the network that has ``num_classes`` outputs.

    Args:
        network: Any module. The function looks at all of its submodules.
        num_classes: The number of logits C.

    Returns:
        The layer, whose weight is ``[C, D]``.

    Raises:
        ValueError: No linear layer has C outputs, or several have. Then pass the layer that
            computes the logits to the function that needs it.

    Example:
        >>> import torch
        >>> from marginops.networks import last_linear
        >>> last_linear(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3)), 3)
        Linear(in_features=4, out_features=3, bias=True)
    """
    check_network(network)
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
        f"network: {problem}; pass head=, the torch.nn.Linear that computes the logits, or "
        "weight=, the tensor [C, D] that they follow from"
    )


def call(network: nn.Module, inputs: Any) -> Any:
    """Call a network with a batch, which may be a tensor, a mapping, a tuple or a list.

    Args:
        network: Any module.
        inputs: A tensor, a mapping of keyword arguments, or a tuple or list of positional
            arguments.

    Returns:
        The output of the network.

    Raises:
        TypeError: The network raised an error, and ``inputs`` are not the arguments of its
            ``forward``.

    Example:
        >>> import torch
        >>> from marginops.networks import call
        >>> call(torch.nn.Linear(4, 3), {"input": torch.zeros(2, 4)}).shape
        torch.Size([2, 3])
    """
    arguments: tuple[Any, ...] = (inputs,)
    keywords: Mapping[str, Any] = {}
    if isinstance(inputs, Mapping):
        arguments, keywords = (), inputs
    elif isinstance(inputs, (tuple, list)):
        arguments = tuple(inputs)
    try:
        return network(*arguments, **keywords)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        forward = unwrap(network).forward if isinstance(network, nn.Module) else network
        problem = advice.problem_of_inputs(inputs)
        problem = problem or advice.problem_of_arguments(forward, arguments, keywords, error)
        if problem is None:
            raise
        raise TypeError(f"inputs: {problem}") from error


def output_tensor(
    output: Any, name: str = "logits", shape: str = "[B, C]", *, at: int | str | None = None
) -> Tensor:
    """The matrix in the output of a network.

    It is the output itself, its attribute ``logits``, or its item ``"logits"`` if the output is a
    mapping. Any other place is named by ``at``.

    Args:
        output: The output of a network.
        name: The name of the matrix in error messages.
        shape: The shape of the matrix in error messages.
        at: The part of ``output`` to take in place of ``output``: a position in a tuple or list, a
            key of a mapping, or the name of an attribute.

    Returns:
        The matrix, a tensor with two dimensions.

    Raises:
        TypeError: The output holds no such tensor, or nothing at this place.
        ValueError: The tensor does not have two dimensions.

    Example:
        >>> import types, torch
        >>> from marginops.networks import output_tensor
        >>> output_tensor(types.SimpleNamespace(logits=torch.zeros(2, 3))).shape
        torch.Size([2, 3])
        >>> output_tensor({"logits": torch.zeros(2, 3)}).shape
        torch.Size([2, 3])
    """
    if at is not None:
        output = _item(output, at)
    result = _logits(output)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"network: expected {name} {shape} as output or as attribute 'logits' of the output "
            f"or under this key, got {type(output).__name__}{advice.for_output(output)}"
        )
    if result.dim() != 2:
        raise ValueError(
            f"network: expected {name} of shape {shape}, got {list(result.shape)}"
            f"{advice.for_output(result)}"
        )
    return result


def _item(output: Any, at: int | str) -> Any:
    is_attribute = isinstance(at, str) and not isinstance(output, Mapping)
    try:
        return getattr(output, str(at)) if is_attribute else output[at]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        holds = f" with {[*output]}" if isinstance(output, Mapping) else ""
        if isinstance(output, (tuple, list)):
            holds = f" of {len(output)} elements"
        raise TypeError(
            f"output: expected a position, key or attribute of the output of network, a "
            f"{type(output).__name__}{holds}, got {at!r}"
        ) from error


def _logits(output: Any) -> Any:
    result = getattr(output, "logits", output)
    return result.get("logits") if isinstance(result, Mapping) else result


@contextmanager
def returning_logits(network: nn.Module) -> Iterator[None]:
    """Make a network return its logits alone where it returns something that holds them."""

    def replace(_: Any, __: Any, output: Any) -> Any:
        result = _logits(output)
        return result if isinstance(result, Tensor) else None  # None keeps the output

    hook = network.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def features_and_logits(network: nn.Module, inputs: Any, head: nn.Module) -> tuple[Tensor, Tensor]:
    """The input of the last layer and the logits, in evaluation mode and without gradient.

    A hook on ``head`` saves its input. Compiled graphs do not run hooks. So the function runs the
    network without wrappers and without compilation, in one forward pass. The modes of all modules
    are restored.

    Args:
        network: A network that returns logits ``[B, C]``, see
            :func:`marginops.networks.output_tensor`.
        inputs: A batch, see :func:`marginops.networks.call`.
        head: The layer of ``network`` that computes the logits, see
            :func:`marginops.networks.last_linear`. It may be any module. The function does not
            check how the logits follow from its input.

    Returns:
        Features ``[B, D]`` and logits ``[B, C]``.

    Raises:
        TypeError, ValueError: The output is not ``[B, C]``, ``network`` does not call ``head``
            exactly once, or the features are not ``[B, D]``.

    Example:
        >>> import torch
        >>> from marginops.networks import features_and_logits
        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
        >>> features, logits = features_and_logits(network, torch.zeros(2, 8), network[1])
        >>> features.shape, logits.shape
        (torch.Size([2, 4]), torch.Size([2, 3]))
    """
    calls, logits = watch_layer(network, inputs, head)
    if len(calls) != 1:
        raise ValueError(
            f"head: expected network to call this layer once in a forward pass, "
            f"got {len(calls)} calls; pass the layer that computes the logits"
        )
    features = calls[0][0]
    if features.dim() != 2:
        raise ValueError(
            f"head: expected network to call this layer with features of shape [B, D], "
            f"got {list(features.shape)}; reduce them to one row for each sample before the head"
        )
    return features, logits


def watch_layer(
    network: nn.Module, inputs: Any, layer: nn.Module, at: int | str | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Run a network as :func:`features_and_logits` does. Its logits are ``at`` this place.

    Returns:
        Input and output of every call of ``layer``, and the logits ``[B, C]``.
    """
    network = unwrap(network)
    if not isinstance(layer, nn.Module):
        raise TypeError(f"head: expected a torch.nn.Module, got {type(layer).__name__}")
    calls: list[tuple[Tensor, Tensor]] = []

    def save(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        given = [v for v in (*arguments, *keywords.values()) if isinstance(v, Tensor)]
        if not given or not isinstance(output, Tensor):
            raise TypeError(
                f"head: expected a layer that maps a tensor to a tensor, got "
                f"{type(layer).__name__}; pass the layer that computes the logits"
            )
        calls.append((given[0], output))

    hook = layer.register_forward_hook(save, with_kwargs=True)
    try:
        with evaluation_mode(network), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = output_tensor(call(network, inputs), at=at)
    finally:
        hook.remove()
    return calls, logits


def predict(network: nn.Module, inputs: Tensor, *, chunk_size: int = 4096) -> Tensor:
    """The logits of all inputs, in evaluation mode and without gradient.

    The modes of all modules are restored.

    Args:
        network: A network that maps ``[B, ...]`` to logits ``[B, C]``, see
            :func:`marginops.networks.output_tensor`.
        inputs: ``[N, ...]``, N >= 1, on the device of ``network``.
        chunk_size: The number of inputs in one forward pass.

    Returns:
        ``[N, C]``, in the dtype of the output of ``network``.

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
    check_inputs("inputs", inputs)
    with evaluation_mode(network), torch.no_grad():
        chunks = inputs.split(chunk_size)
        return torch.cat([output_tensor(call(network, chunk)) for chunk in chunks])


def check_inputs(name: str, value: Any) -> None:
    """Check that the inputs of all samples are one tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, got {type(value).__name__}{advice.for_object(name, value)}"
        )
