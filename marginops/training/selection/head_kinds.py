"""The layers that may compute logits, ``F.linear(features, weight, bias)``, and their weights."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ... import _checks as checks
from ...networks import last_linear
from ...ops.arguments import check_weight
from .adapters import adapted_parameters, hidden_layers, is_adapted_linear

_CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d
Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding


def check_head_type(head: Any) -> None:
    """Check that a head is a linear layer, perhaps with an adapter, or None."""
    if head is None or isinstance(head, nn.Linear) or is_adapted_linear(head):
        return
    kind, todo = type(head).__name__, "pass this layer, or "
    if isinstance(head, str):
        todo = f"pass network.get_submodule({head!r}), or "
    elif isinstance(head, nn.Module):  # perhaps a Linear as well, such as a quantized one
        kind, todo = f"{kind} of {type(head).__module__}", "pass "
    raise TypeError(
        f"head: expected a torch.nn.Linear, got {kind}; {todo}weight=, the tensor [C, D] whose "
        "distances between rows fit the logits"
    )


def check_any_head(head: Any) -> None:
    """Check that a head is a linear layer, a 1x1 convolution, an embedding or None."""
    if isinstance(head, _CONVOLUTIONS):
        if not _is_pointwise(head):
            raise ValueError(
                "head: expected a convolution with kernel size 1 and one group, got kernel size "
                f"{head.kernel_size} and {head.groups} groups; pass weight=, the tensor [C, D] "
                "whose distances between rows fit the logits"
            )
    elif not isinstance(head, nn.Embedding):
        check_head_type(head)


def head_weight(head: Head) -> Tensor:
    """The weight of a head as a matrix ``[C, D]``, with its adapters."""
    weight = gathered(adapted_parameters(head)[0] if is_adapted_linear(head) else head.weight)
    return weight.flatten(1) if weight.dim() > 2 else weight


def head_bias(head: Head) -> Tensor | None:
    """The bias of a head, ``[C]``; None for an embedding."""
    bias = adapted_parameters(head)[1] if is_adapted_linear(head) else getattr(head, "bias", None)
    return None if bias is None else gathered(bias)


def gathered(value: Any) -> Tensor:
    """The whole tensor of a DTensor, for which all ranks of its mesh have to call this function."""
    whole: Tensor = value.full_tensor() if checks.is_distributed(value) else value
    return whole


def find_linear(network: nn.Module, num_classes: int) -> Any:
    """The linear layer with ``num_classes`` outputs; with adapters, the one that is called."""
    modules = list(network.modules())
    return _called_linear(network, modules, _linears(modules, num_classes), num_classes)


def _linears(modules: list[nn.Module], num_classes: int) -> list[Any]:
    linears: list[Any] = [
        module for module in modules if isinstance(module, nn.Linear) or is_adapted_linear(module)
    ]
    return [module for module in linears if module.weight.shape[0] == num_classes]


def _called_linear(
    network: nn.Module, modules: list[nn.Module], linears: list[Any], num_classes: int
) -> Any:
    hidden = hidden_layers(modules)
    called = [module for module in linears if module not in hidden]
    found = called[0] if len(called) == 1 else last_linear(network, num_classes)
    if found in hidden:
        raise ValueError(
            f"network: expected a linear layer with {num_classes} outputs that computes the "
            "logits, got one inside an adapter; merge the adapter, or pass weight=, the tensor "
            "[C, D] that the logits follow from"
        )
    return found


def find_head(network: nn.Module, num_classes: int) -> Any:
    """The layer that computes the logits, as far as its kind and shape tell.

    It is the linear layer that :func:`find_linear` finds. A network without a linear layer of this
    size may have one 1x1 convolution of this size, or else one embedding.
    """
    modules = list(network.modules())
    linears = _linears(modules, num_classes)
    for kinds in () if linears else (_CONVOLUTIONS, (nn.Embedding,)):
        fitting: list[Any] = [
            module
            for module in modules
            if isinstance(module, kinds)
            and module.weight.shape[0] == num_classes
            and (kinds is not _CONVOLUTIONS or _is_pointwise(module))
        ]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    return _called_linear(network, modules, linears, num_classes)


def _is_pointwise(convolution: Any) -> bool:
    """Whether a convolution applies one matrix ``[C, D]`` to the channels at each position."""
    return bool(convolution.weight[0, 0].numel() == 1 and convolution.groups == 1)


def fitting_weight(weight: Any, logits: Tensor) -> Tensor:
    """Check a weight for the logits of a network, and convert it to a dtype that fits them."""
    checks.check_tensor("weight", weight, 2, "[C, D]")
    if weight.dtype != logits.dtype:
        weight = weight.to(checks.result_dtype(logits.dtype))
    check_weight(weight, logits)
    return weight


_PRODUCTS = {F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm}


class Products(TorchFunctionMode):
    """Notes features that are multiplied with the weight of an embedding, and the results.

    A network with tied weights does not call the embedding for its logits.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in _PRODUCTS:
            features, other = [*args, *kwargs.values()][:2]
            strides = self._weight.stride()
            if func is not F.linear:
                strides = strides[::-1]
            if other.data_ptr() == self._weight.data_ptr() and other.stride() == strides:
                self.calls.append((features, output))
        return output
