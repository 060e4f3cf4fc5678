"""Traces a model with ``torch.fx``, in evaluation mode and without a change to it."""

import copy
import inspect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import layers as kinds


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        if kinds.is_layer(module) or kinds.is_normalization(module):
            return True
        own = type(module).__module__.startswith("torch.nn.")
        return own and next(module.children(), None) is None and not kinds.has_own_forward(module)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide a comparison of dtypes: all values have the dtype of the weights."""
        node = obj.node
        if node.target in (operator.eq, operator.ne) and any(map(_is_dtype, node.args)):
            return node.target is operator.eq
        return super().to_bool(obj)


def _is_dtype(argument: Any) -> bool:
    if isinstance(argument, fx.Node):
        return argument.target is getattr and argument.args[1] == "dtype"
    return isinstance(argument, torch.dtype)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of the model, whose nodes have the paths of the model's modules."""
    parameters = inspect.signature(model.forward).parameters.values()
    has_more = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    if has_more or kinds.has_own_forward(model):
        # The tracer has no value for *args and looks at the class only. A container calls the
        # model with one argument.
        graph = _Tracer().trace(nn.Sequential(model))
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                node.target = _inner(node.target)
            stack = node.meta.get("nn_module_stack", {})
            for key, (path, kind) in stack.items():
                stack[key] = _inner(path), kind
        return graph
    # Optional arguments get their defaults. A proxy in their place would count as given.
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _Tracer().trace(model, defaults)


def _inner(path: str) -> str:
    """The path in the model of a path in a container with the model only."""
    return path.removeprefix("0").removeprefix(".")


def evaluated_copy(model: nn.Module, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy of the model in evaluation mode, without hooks. It shares its parameters.

    Args:
        model: The model.
        shared: Modules that the copy shares unchanged, because nobody runs them.
    """
    kept = {id(module): module for whole in shared for module in whole.modules()}
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()} | kept
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                memo[id(value)] = value
            elif name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"model: expected a module that copy.deepcopy can copy, got {type(model).__name__} "
            f"({type(error).__name__}: {error}); if it is sharded, gather it first"
        ) from error
    for module in copied.modules():
        if id(module) not in kept:
            module.training = False
    return copied
