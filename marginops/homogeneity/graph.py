"""Traces a model with ``torch.export`` and collects the equations between its rates."""

import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.nn.utils.parametrize import type_before_parametrizations

from ..networks import evaluation_mode, returning_logits
from .equations import Form, NotQuasiHomogeneousError, Operation, System, Value
from .rules import CARRYING, CREATING, RULES, UNSCALED


def export(model: nn.Module, example_input: tuple[Any, ...]) -> Any:
    """Export the model in evaluation mode, as a graph of ATen operations without side effects."""
    try:
        with evaluation_mode(model), returning_logits(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, example_input, strict=False)
            if all(_has_rule(node) for node in exported.graph.nodes):
                return exported
            # Decomposition removes in-place and composite operations. It takes several times as
            # long as the export.
            return exported.run_decompositions({})
    except Exception as error:
        raise RuntimeError(
            "rates: torch.export cannot trace the model in evaluation mode with this "
            f"example_input: {error}"
        ) from error


class Network:
    """The equations of an exported graph.

    Attributes:
        system: The equations.
        output: The rate of the output, a form that has to be 1.
        place: The operation and module that compute the output.
    """

    def __init__(self, model: nn.Module, exported: Any, names: list[str]) -> None:
        _check_memory(model)
        self.model = model
        self.system = System(len(names))
        output = _output(exported)
        self.place = self._place(output)
        values = self._inputs(exported, names)
        needed = _ancestors(output)
        for node in exported.graph.nodes:
            if node in needed and node not in values:
                values[node] = self._value(node, values)
        rate = values[output].rate
        if not values[output].parameters or rate is None:
            raise NotQuasiHomogeneousError(
                f"rates: the output, {self.place}, does not depend on any parameter"
            )
        self.output = rate

    def _inputs(self, exported: Any, names: list[str]) -> dict[Node, Value]:
        specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
        # torch.export chooses one of the names of a shared parameter, so look it up by identity.
        indices = {id(self.model.get_parameter(name)): i for i, name in enumerate(names)}
        storages = {_storage(parameter) for parameter in self.model.parameters()} - {0}
        values = {}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                values[node] = self._constant(spec.kind == InputKind.USER_INPUT)
                held = exported.state_dict.get(spec.target, exported.constants.get(spec.target))
                if spec.kind != InputKind.PARAMETER and _storage(held) in storages:
                    raise ValueError(
                        f"model: expected buffers with memory of their own, got {spec.target!r} "
                        "in the memory of a parameter"
                    )
                if spec.kind == InputKind.CONSTANT_TENSOR and not held.any():
                    values[node] = Value(None)
                if spec.kind == InputKind.PARAMETER:
                    parameter = self.model.get_parameter(spec.target)
                    if _has_rate(parameter):
                        values[node] = self.system.parameter(indices[id(parameter)])
        return values

    def _constant(self, varies: bool) -> Value:
        return Value(self.system.constant(), varies=varies)

    def _value(self, node: Node, values: dict[Node, Value]) -> Value:
        operands = [values[operand] for operand in node.all_input_nodes]
        parameters = frozenset[int]().union(*(operand.parameters for operand in operands))
        varies = any(operand.varies for operand in operands)
        floating = _is_floating(node)
        name = _name(node)
        if node.target is operator.getitem:
            rate = operands[0].rate
        elif not parameters:
            zeros = name in CARRYING and all(operand.rate is None for operand in operands)
            can_be_zero = zeros or name in CREATING
            rate = self._rate(node, name, values) if can_be_zero else self.system.constant()
        elif not any(operand.floating for operand in operands):
            rate = self.system.constant()
        else:
            rate = self._rate(node, name, values)
        if not floating:
            rate = self.system.constant()
        carries = not varies and (name in CARRYING or node.target is operator.getitem)
        weights = frozenset[int]().union(*(operand.weights for operand in operands))
        return Value(rate, parameters, weights if carries else frozenset(), varies, floating)

    def _rate(self, node: Node, name: str, values: dict[Node, Value]) -> Form | None:
        place = self._place(node)
        if name in UNSCALED:
            raise NotQuasiHomogeneousError(f"rates: {place} is not quasi-homogeneous")
        if name not in RULES:
            raise NotQuasiHomogeneousError(f"rates: {place} has no rule, so its rate is unknown")
        given = dict(zip(_argument_names(node), node.args, strict=False))
        given |= node.kwargs
        arguments = {key: _replaced(argument, values) for key, argument in given.items()}
        sizes = {
            key: tuple(argument.meta["val"].shape)
            for key, argument in given.items()
            if isinstance(argument, Node) and isinstance(argument.meta.get("val"), Tensor)
        }
        return RULES[name](Operation(name, arguments, self.system, place, sizes))

    def _place(self, node: Node) -> str:
        """The operation and its module. For a module that is not PyTorch's, also the line."""
        if node.op != "call_function":
            return node.name
        if node.target is operator.getitem:
            return self._place(node.all_input_nodes[0])
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        path = stack[-1][0]
        kind = type_before_parametrizations(self.model.get_submodule(path.split("@")[0]))
        place = f"{_name(node)} at {path or 'the model'}"
        if getattr(nn, kind.__name__, None) is kind:
            return f"{place} (torch.nn.{kind.__name__})"
        lines = (node.meta.get("stack_trace") or "").strip().splitlines()
        code = f" in `{lines[-1].strip()}`" if lines else ""
        return f"{place} ({kind.__qualname__}){code}"


def _check_memory(model: nn.Module) -> None:
    """Check that no two parameters share memory, because scaling one would scale the other."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        pointer = parameter.data_ptr()  # 0 for tensors without memory
        if pointer and owners.setdefault(pointer, name) != name:
            raise ValueError(
                "model: expected different parameters to have their own memory, got "
                f"{name!r} in the memory of {owners[pointer]!r}; to share a parameter, use one "
                "torch.nn.Parameter"
            )


def _storage(held: Any) -> int | None:
    return held.untyped_storage().data_ptr() if isinstance(held, Tensor) else None


def _output(exported: Any) -> Node:
    """The one tensor that the exported program returns."""
    kept, structure = exported.graph.output_node().args[0], exported.call_spec.out_spec
    outputs = kept[len(kept) - structure.num_leaves :]
    if structure.num_children or not outputs or not isinstance(outputs[0], Node):
        kind = getattr(structure.type, "__name__", "no tensor")
        raise ValueError(f"model: expected one tensor as output, got {kind}")
    if not _is_floating(outputs[0]):
        raise ValueError(
            f"model: expected a floating-point output, got {outputs[0].meta['val'].dtype}"
        )
    return outputs[0]


def _ancestors(output: Node) -> set[Node]:
    found, left = {output}, [output]
    while left:
        for node in left.pop().all_input_nodes:
            if node not in found:
                found.add(node)
                left.append(node)
    return found


def _name(node: Node) -> str:
    """The name of an ATen operation without namespace and overload, or of another function."""
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, name = node.target._schema.name.split("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    return str(getattr(node.target, "__name__", node.target))


def _has_rule(node: Node) -> bool:
    """Whether an operation needs no decomposition: it has a rule and changes nothing in place."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    operation: Any = node.target
    pure = isinstance(operation, torch._ops.OpOverload) and not operation._schema.is_mutable
    return pure and (_name(node) in RULES or _name(node) in UNSCALED)


def _argument_names(node: Node) -> list[str]:
    operation: Any = node.target
    return [argument.name for argument in operation._schema.arguments]


def _is_floating(node: Node) -> bool:
    """Whether a value is a floating-point tensor or a tuple, whose elements are checked later."""
    value = node.meta.get("val")
    return _has_rate(value) if isinstance(value, Tensor) else True


def _has_rate(tensor: Tensor) -> bool:
    """Whether a tensor has a rate. Integers and booleans have none."""
    return tensor.is_floating_point() or tensor.is_complex()


def _replaced(argument: Any, values: dict[Node, Value]) -> Any:
    if isinstance(argument, Node):
        return values[argument]
    if isinstance(argument, (list, tuple)):
        return [_replaced(item, values) for item in argument]
    return argument
