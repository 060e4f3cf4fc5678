"""Refuses models in which the weights of the layers do not tell what the layers compute."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .. import _advice as advice
from .._checks import is_distributed
from . import layers as kinds
from .tracing import trace

_MERGED = "merge it into its layer first, with peft by model.merge_and_unload()"
# Functions that are linear in their first argument and do not mix its values.
_CARRYING = {
    *("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"),
    *("detach", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute"),
    *("transpose", "t", "neg", "mul", "imul", "div", "truediv", "itruediv"),
}
_SUMS = {"add", "iadd", "sub", "isub"}
# Functions that multiply by a matrix.
_PRODUCTS = {
    *("linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "mv", "dot", "vdot", "inner"),
    *("addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot", "kron", "chain_matmul"),
    *("linalg_multi_dot", "multi_dot", "vecdot", "linalg_vecdot", "embedding", "embedding_bag"),
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *("convolution", "multi_head_attention_forward"),
}


def check_not_compiled_or_sharded(path: str, module: nn.Module) -> None:
    """Refuse a compiled program, and a module whose parameters are spread over processes."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"model: expected modules in Python, got {kinds.described(path, module)}, a compiled "
            "program whose weights may be constants; pass the model from before it was compiled"
        )
    for name, value in module._parameters.items():
        if value is not None and is_distributed(value):
            raise TypeError(
                f"model: expected ordinary tensors as parameters, got a DTensor as {name} of "
                f"{kinds.described(path, module)}; {advice.GATHERED}"
            )


def check_module(path: str, module: nn.Module) -> None:
    """Refuse a module that has weights but is no layer, or whose weights are packed."""
    own = [name for name, value in module._parameters.items() if value is not None]
    if own and not kinds.is_parametric_relu(module):
        raise ValueError(
            "model: expected linear layers, convolutions, normalisations and modules without "
            f"parameters, got {kinds.described(path, module)} with {', '.join(own)}, for which "
            f"no norm is defined{_advice(module)}"
        )
    packed = [name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)]
    if packed:
        raise ValueError(
            f"model: expected layers with a weight, got {kinds.described(path, module)} with "
            f"{', '.join(packed)}, which packs its weight; {advice.UNQUANTIZED}"
        )


def _advice(module: nn.Module) -> str:
    if any(not value.dtype.is_floating_point for value in module.parameters(recurse=False)):
        return f"; {advice.UNQUANTIZED}"
    if kinds.has_own_forward(module):
        return "; the module has a forward of its own, which is not that of its class"
    holds_parts = isinstance(module, (nn.ParameterDict, nn.ParameterList))
    has_matrix = any(_is_matrix(value.shape) for value in module.parameters(recurse=False))
    if holds_parts or (has_matrix and not type(module).__module__.startswith("torch.")):
        return f"; if it is an adapter, {_MERGED}"
    return ""


def check_graph(graph: fx.Graph, root: nn.Module, path: str = "") -> None:
    """Refuse weights outside layers, and several layers that act as one matrix.

    Args:
        graph: The graph of ``root``.
        root: The traced copy of the model or of a part of it.
        path: The path of ``root`` in the model.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    prefix = f"{path}." if path else ""
    # For each value that does not depend on the input, the tensor that it is computed from if any.
    constants: dict[fx.Node, str] = {}
    # For each value, the places of the values that it depends on linearly, and a layer between.
    sources: dict[fx.Node, dict[int, str]] = {}
    for place, node in enumerate(graph.nodes):
        sources[node] = {place: ""}
        if node.op == "get_attr":
            _check_attribute(node, modules, prefix)
            constants[node] = f"{prefix}{node.target}"
            continue
        inputs = node.all_input_nodes
        known = [constants[value] for value in inputs if value in constants]
        held = next(filter(None, known), "")
        name = function_name(node).strip("_")
        if reads_description(node) or (known and len(known) == len(inputs)):
            constants[node] = held
        elif held and (name in _PRODUCTS or _is_foreign(node)):
            raise ValueError(
                f"model: expected every matrix to be the weight of a layer, got {held}, which is "
                f"used as a matrix in {place_of(node) or path or 'the model itself'} "
                f"({node.format_node()})"
            )
        elif node.op == "call_module" and _is_linear(modules[node.target]):
            layer = f"{prefix}{node.target}" if kinds.is_layer(modules[node.target]) else ""
            for source, before in sources[inputs[0]].items():
                sources[node][source] = before or layer
        elif name in _CARRYING or is_idle_dropout(node):
            if len(inputs) == 1 + len(known) and node.args[0] is inputs[0]:
                sources[node].update(sources[inputs[0]])
        elif name in _SUMS:
            sources[node].update(_sum(*(sources[value] for value in inputs)))


def _sum(first: dict[int, str], *others: dict[int, str]) -> dict[int, str]:
    """The sources of a sum, or an error if two layers with the same input are added."""
    found = dict(first)
    for sources in others:
        shared = found.keys() & sources.keys()
        # The paths from the earlier sources may all lead through the nearest one.
        layers = [terms[max(shared)] for terms in (found, sources)] if shared else [""]
        if all(layers):
            raise ValueError(
                "model: expected layers that follow each other or have activations between them, "
                f"got the sum of {' and '.join(layers)}, which have the same input and so act as "
                f"one matrix; replace them by one layer; if one is an adapter, {_MERGED}"
            )
        for source, layer in sources.items():
            found[source] = found.get(source) or layer
    return found


def _check_attribute(node: fx.Node, modules: dict[str, nn.Module], prefix: str) -> None:
    """Raise an error for a parameter that is used outside its module. No norm would count it."""
    path, _, name = str(node.target).rpartition(".")
    is_parameter = isinstance(getattr(modules.get(path), name, None), nn.Parameter)
    uses = [user for user in node.users if not reads_description(user)]
    if is_parameter and uses:
        raise ValueError(
            "model: expected parameters to be used by their own module only, got "
            f"{prefix}{node.target} with another use ({uses[0].format_node()})"
        )


def _is_linear(module: nn.Module) -> bool:
    own = isinstance(module, (*kinds.IDENTITIES, nn.Flatten, nn.Unflatten))
    return own or kinds.is_layer(module) or kinds.is_batch_norm(module)


def _is_foreign(node: fx.Node) -> bool:
    """Whether the node calls an operator that is not PyTorch's own."""
    operators = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    return isinstance(node.target, operators) and not str(node.target).startswith("aten.")


def reads_description(node: fx.Node) -> bool:
    """Whether the node reads the shape, the dtype or the like, which no values change."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in kinds.DESCRIBING


def place_of(node: fx.Node) -> str:
    """The path of the module whose code has the node."""
    inside = list(node.meta.get("nn_module_stack", {}).values())
    return inside[-1][0] if inside else ""


def function_name(node: fx.Node) -> str:
    """The name of a function or method."""
    return getattr(node.target, "__name__", str(node.target))


def is_idle_dropout(node: fx.Node) -> bool:
    """Whether the node is a dropout function with ``training=False``."""
    return "dropout" in function_name(node) and node.kwargs.get("training") is False


def check_untraceable(copied: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Refuse weights that a model without a graph may hold beside its layers.

    Args:
        copied: A copy of the model. Its parts that have a graph are checked by that.
        modules: The modules of the model.
    """
    registered = {id(module) for module in modules.values()}
    for module in modules.values():
        registered |= {id(value) for value in module._parameters.values()}
    for path, module in modules.items():
        if type(module).__module__.startswith(("torch.nn.", "torch.ao.")) or _is_metric(module):
            continue
        held = {**module._buffers, **vars(module)}
        for name in held.keys() - vars(nn.Module()).keys():
            if any(id(value) not in registered for value in _weights(held[name])):
                raise ValueError(
                    "model: expected the weights of a model that torch.fx cannot trace to be "
                    f"parameters of its layers, got {kinds.described(path, module)} with {name}, "
                    "which may be a weight"
                )
    _check_parts(copied, "")


def _is_metric(module: nn.Module) -> bool:
    """Whether this is a metric of torchmetrics, whose states are no weights."""
    return any(kind.__module__.startswith("torchmetrics.") for kind in type(module).__mro__)


def _weights(value: Any, depth: int = 3) -> Iterator[Any]:
    """Modules and matrices in a value. Masks and indices are no matrices."""
    if isinstance(value, (nn.Module, torch.ScriptObject)):
        yield value
    elif isinstance(value, Tensor):
        if _is_matrix(value.shape) and value.dtype not in (torch.bool, torch.int64):
            yield value
    elif isinstance(value, np.ndarray):
        if _is_matrix(value.shape) and value.dtype.kind == "f":
            yield value
    elif isinstance(value, (list, tuple, dict)) and depth:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _weights(item, depth - 1)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether this is no vector. The means of the channels of images are one, ``[1, 3, 1, 1]``."""
    return len(shape) == 2 or sum(size != 1 for size in shape) > 1


def _check_parts(module: nn.Module, path: str) -> None:
    for name, child in module.named_children():
        if kinds.is_layer(child) or kinds.is_normalization(child):
            continue
        place = f"{path}.{name}" if path else name
        try:
            graph = trace(child)
        except Exception:
            _check_parts(child, place)
        else:
            check_graph(graph, child, place)
