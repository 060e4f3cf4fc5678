"""Heads inside adapters, as PEFT makes them: the layer that computes the logits, and its weight.

An adapter is recognised by its methods and attributes, so PEFT need not be installed.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_adapted_linear(module: Any) -> bool:
    """Whether a module is a linear layer with LoRA."""
    return _is_adapter(module) and "lora_B" in module._modules


def _is_adapter(module: Any) -> bool:
    # The class is asked, because modules are slow to say that they lack an attribute.
    if not hasattr(type(module), "get_base_layer") or not isinstance(module, nn.Module):
        return False
    return isinstance(getattr(module, "base_layer", None), nn.Linear)


def hidden_layers(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Layers that are parts of an adapter, or that the network keeps and does not call now."""
    hidden: set[nn.Module] = set()
    for module in modules:
        if _is_adapter(module):
            hidden.update(module.modules())
            # The layer inside computes the output where an adapter of another kind is merged.
            is_inside = bool(module.merged) and not is_adapted_linear(module)
            hidden.remove(module.get_submodule("base_layer") if is_inside else module)
        # A copy that is trained stands beside the original layer (modules_to_save of PEFT).
        original = getattr(module, "original_module", None)
        copies = None if original is None else getattr(module, "modules_to_save", None)
        if isinstance(original, nn.Module) and isinstance(copies, nn.ModuleDict):
            called = _called_layer(module, original, copies)
            for layer in (original, *copies.values()):
                if layer is not called:
                    hidden.update(layer.modules())
    return hidden


def _called_layer(wrapper: Any, original: nn.Module, copies: nn.ModuleDict) -> nn.Module:
    active = _active(wrapper)
    return copies[active[0]] if active and active[0] in copies else original


def _active(adapter: Any) -> list[str]:
    """The names of the adapters that have an effect in the next forward pass."""
    return [] if adapter.disable_adapters else list(adapter.active_adapters)


def adapted_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a linear layer with LoRA multiplies with and adds.

    They are those of the layer itself while its adapters are merged into it or disabled.

    Raises:
        ValueError: The adapter is a variant that does more than to add to the weight.
    """
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    for name in [] if layer.merged else _active(layer):
        if name not in layer.lora_B:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or getattr(layer, "use_dora", {}).get(name, False):
            kind = "DoRA" if variant is None else type(variant).__name__
            raise ValueError(
                f"head: expected LoRA that adds to the weight, got {kind} in adapter {name!r}; "
                "merge the adapter into the layer, or pass weight=, the tensor [C, D] whose "
                "distances between rows fit the logits"
            )
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
        if (step := layer.lora_B[name].bias) is not None:
            step = step * layer.scaling[name]
            bias = step if bias is None else bias + step
    return weight, bias


def adapter_state(module: nn.Module) -> tuple[Any, ...]:
    """Which adapters of a module have an effect; empty for a module without adapters."""
    if not hasattr(type(module), "active_adapters"):
        return ()
    values = (getattr(module, name, None) for name in ("disable_adapters", "merged"))
    names = module.active_adapters
    # Some networks have a method of this name, which would keep the network alive.
    state = tuple(names) if isinstance(names, (list, str)) else ()
    return *state, *(value for value in values if isinstance(value, bool))
