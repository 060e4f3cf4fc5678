"""The order in which a model calls its layers, and the layer that each batch norm follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._checks import check_not_distributed
from .._operations import changes_scale
from . import layers as kinds
from .tracing import evaluated_copy, trace
from .unsupported import (
    check_graph,
    check_module,
    check_not_compiled_or_sharded,
    check_untraceable,
    function_name,
    is_idle_dropout,
    place_of,
)


@dataclass(eq=False)
class Call:
    """One call of a layer or normalisation.

    Attributes:
        path: The path of the module in the model.
        module: The layer or normalisation.
        batch_norm: The call of the batch norm that directly follows a layer; None if there is none.
        shapes: The shapes of input and output; None if the model did not run.
    """

    path: str
    module: Any  # nn.Module, whose attributes have no types
    batch_norm: Call | None = None
    shapes: tuple[torch.Size, torch.Size] | None = None

    @property
    def name(self) -> str:
        """The name of the module in messages."""
        return kinds.described(self.path, self.module)


@dataclass
class Structure:
    """The structure of a model, which does not depend on the values of its parameters.

    Attributes:
        calls: The calls of layers and normalisations in their order.
        breaking: Modules and functions that do not keep the scale of their input.
        unfoldable: A batch norm that no layer takes, and why; None if there is none.
        untraceable: Why ``torch.fx`` cannot trace the model; None if it can. Then each layer and
            normalisation counts as called once, in the order of registration.
    """

    calls: list[Call] = field(default_factory=list)
    breaking: list[str] = field(default_factory=list)
    unfoldable: str | None = None
    untraceable: str | None = None


def examine(model: nn.Module) -> Structure:
    """Trace a copy of the model, and refuse one whose norm product is not defined."""
    # A module with several names stands under each of them.
    modules = dict(model.named_modules(remove_duplicate=False))
    walked = _walk(modules)
    if not any(kinds.is_layer(call.module) for call in walked.calls):
        raise ValueError(
            "model: expected at least one linear layer or convolution, "
            f"got {type(model).__name__} without any"
        )
    if walked.calls[0].path == "":
        return walked
    copied = evaluated_copy(model, (call.module for call in walked.calls))
    try:
        graph = trace(copied)
    except Exception as error:
        walked.untraceable = f"{type(error).__name__}: {error}".split("\n")[0]
        check_untraceable(copied, modules)
        return walked
    check_graph(graph, copied)
    return _read(graph, modules, walked.breaking)


def _walk(modules: dict[str, nn.Module]) -> Structure:
    """Layers and normalisations in the order of their registration.

    The function also collects the modules that do not keep the scale of their input.
    """
    found = Structure()
    inside: str | None = None
    for path, module in modules.items():
        if inside is not None and path.startswith(inside):
            continue
        check_not_compiled_or_sharded(path, module)
        if kinds.is_layer(module) or kinds.is_normalization(module):
            found.calls.append(Call(path, module))
            inside = f"{path}." if path else ""  # skip the modules of a parametrization
        else:
            check_module(path, module)
        if not kinds.keeps_scale(module):
            found.breaking.append(kinds.described(path, module))
    return found


def _read(graph: fx.Graph, modules: dict[str, nn.Module], breaking: list[str]) -> Structure:
    found = Structure(breaking=list(breaking))
    calls: dict[fx.Node, Call] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            call = Call(node.target, modules[node.target])
            if kinds.is_batch_norm(call.module):
                _fold(node, call, modules, calls, found)
            if kinds.is_layer(call.module) or kinds.is_normalization(call.module):
                calls[node] = call
        elif node.op in ("call_function", "call_method"):
            name = function_name(node)
            if changes_scale(name):
                place = place_of(node) or "the model itself"
                found.breaking.append(f"{place} (function {name})")
    found.calls.extend(calls.values())
    return found


def _fold(
    node: fx.Node,
    norm: Call,
    modules: dict[str, nn.Module],
    calls: dict[fx.Node, Call],
    found: Structure,
) -> None:
    """Find the layer before a batch norm. Modules without effect in evaluation are skipped."""
    source, uses = node.all_input_nodes[0], 1
    while True:
        uses = max(uses, len(source.users))
        module = modules.get(str(source.target)) if source.op == "call_module" else None
        if not (isinstance(module, kinds.IDENTITIES) or is_idle_dropout(source)):
            break
        source = source.all_input_nodes[0]
    follows_layer = module is not None and kinds.is_layer(module)
    if follows_layer and uses == 1:
        calls[source].batch_norm = norm
    elif found.unfoldable is None:
        why = "after a layer whose output has other uses" if follows_layer else "after no layer"
        found.unfoldable = f"{norm.name} {why}"


def watch(model: nn.Module, example_input: Any) -> list[Call]:
    """Run a copy of the model on the example, and list all calls of layers and normalisations."""
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise TypeError(
            "example_input: expected a tensor or a tuple of tensors, "
            f"got {type(example_input).__name__}"
        )
    for value in inputs:
        check_not_distributed("example_input", value)
    calls: list[Call] = []
    copied = evaluated_copy(model)

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: Any, named: Any, result: Tensor) -> None:
            value = given[0] if given else next(iter(named.values()))
            shapes = value.shape, result.shape
            calls.append(Call(path, model.get_submodule(path), shapes=shapes))

        return hook

    for path, module in copied.named_modules():
        if kinds.is_layer(module) or kinds.is_normalization(module):
            module.register_forward_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        copied(*inputs)
    return calls
