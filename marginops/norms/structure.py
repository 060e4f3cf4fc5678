"""The order in which a model calls its layers, and the layer that each batch norm follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from .._checks import check_not_distributed
from .._operations import changes_scale
from . import layers as kinds
from .tracing import evaluated_copy, trace
from .unsupported import (
    check_graph,
    check_module,
    check_untraceable,
    check_whole,
    function_name,
    is_idle_dropout,
    place_of,
)


class Call(NamedTuple):
    """One call of a layer or normalisation, with the shapes of its input and output."""

    path: str
    input: torch.Size
    output: torch.Size


@dataclass
class Structure:
    """The structure of a model, which does not depend on the values of its parameters.

    Attributes:
        sequence: The paths of layers and normalisations in the order of their calls.
        breaking: Modules and functions that do not keep the scale of their input.
        folds: The path of the batch norm that follows a layer, by the layer's index in
            ``sequence``.
        unfoldable: A batch norm that no layer takes, and why; None if there is none.
        untraceable: Why ``torch.fx`` cannot trace the model; None if it can.
    """

    sequence: list[str]
    breaking: list[str] = field(default_factory=list)
    folds: dict[int, str] = field(default_factory=dict)
    unfoldable: str | None = None
    untraceable: str | None = None


def examine(model: nn.Module, modules: dict[str, nn.Module]) -> Structure:
    """Trace a copy of the model, and refuse one whose norm product is not defined.

    Args:
        model: The model.
        modules: All of its modules by path, a module with several names under each of them.
    """
    walked = _walk(modules)
    if not any(kinds.is_layer(modules[path]) for path in walked.sequence):
        raise ValueError(
            "model: expected at least one linear layer or convolution, "
            f"got {type(model).__name__} without any"
        )
    if walked.sequence == [""]:
        return walked
    copied = evaluated_copy(model, (modules[path] for path in walked.sequence))
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
    found = Structure([])
    inside: str | None = None
    for path, module in modules.items():
        if inside is not None and path.startswith(inside):
            continue
        check_whole(path, module)
        if kinds.is_layer(module) or kinds.is_normalization(module):
            found.sequence.append(path)
            inside = f"{path}." if path else ""  # skip the modules of a parametrization
            if not kinds.is_layer(module) and not kinds.is_batch_norm(module):
                found.breaking.append(kinds.described(path, module))
            continue
        check_module(path, module)
        if not kinds.keeps_scale(module):
            found.breaking.append(kinds.described(path, module))
    return found


def _read(graph: fx.Graph, modules: dict[str, nn.Module], breaking: list[str]) -> Structure:
    found = Structure([], list(breaking))
    places: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            if kinds.is_batch_norm(module):
                _fold(node, modules, places, found)
            if kinds.is_layer(module) or kinds.is_normalization(module):
                places[node] = len(found.sequence)
                found.sequence.append(node.target)
        elif node.op in ("call_function", "call_method"):
            name = function_name(node)
            if changes_scale(name):
                place = place_of(node) or "the model itself"
                found.breaking.append(f"{place} (function {name})")
    return found


def _fold(
    node: fx.Node, modules: dict[str, nn.Module], places: dict[fx.Node, int], found: Structure
) -> None:
    """Find the layer before a batch norm. Modules without effect in evaluation are skipped."""
    source, uses = node.all_input_nodes[0], 1
    while True:
        uses = max(uses, len(source.users))
        module = modules.get(str(source.target)) if source.op == "call_module" else None
        if not (isinstance(module, kinds.IDENTITIES) or is_idle_dropout(source)):
            break
        source = source.all_input_nodes[0]
    if module is not None and kinds.is_layer(module) and uses == 1:
        found.folds[places[source]] = str(node.target)
    elif found.unfoldable is None:
        is_shared = module is not None and kinds.is_layer(module)
        why = "after a layer whose output has other uses" if is_shared else "after no layer"
        found.unfoldable = f"{kinds.described(str(node.target), modules[str(node.target)])} {why}"


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
        def hook(module: nn.Module, given: Any, named: Any, result: Tensor) -> None:
            value = given[0] if given else next(iter(named.values()))
            calls.append(Call(path, value.shape, result.shape))

        return hook

    for path, module in copied.named_modules():
        if kinds.is_layer(module) or kinds.is_normalization(module):
            module.register_forward_hook(note(path), with_kwargs=True)
    with torch.no_grad():
        copied(*inputs)
    return calls
