"""The matrices of a model whose norms make up the norm product."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..networks import unwrap
from . import layers as kinds
from .structure import Call, Structure, examine, watch
from .unsupported import check_whole

BatchNorm = Literal["fold", "last", "affine"]
Convolution = Literal["flattened", "operator"]


class Factor(NamedTuple):
    """The matrix of one call of a layer, or the diagonal matrix of a batch norm.

    Attributes:
        path: The path of the module in the model.
        module: The layer or batch norm.
        weight: The weight of the module.
        batch_norm: The batch norm that is folded into the rows; None if there is none.
        call: The shapes of the call, with ``conv="operator"``; else None.
    """

    path: str
    module: Any  # nn.Module, whose attributes have no types
    weight: Tensor
    batch_norm: Any
    call: Call | None

    @property
    def name(self) -> str:
        """The name of the module in messages."""
        return kinds.described(self.path, self.module)

    @property
    def is_operator(self) -> bool:
        """Whether the matrix maps the whole input of a convolution to its whole output."""
        return self.call is not None and isinstance(
            self.module, (*kinds.CONVOLUTIONS, *kinds.TRANSPOSED)
        )


def factors_of(
    model: Any,
    batch_norm: Any,
    conv: Any,
    example_input: Any,
    stacklevel: int,
    argument: str = "model",
) -> list[Factor]:
    """The matrices that count, in the order of their calls.

    The function warns if the model does not scale with the product of their norms.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(model).__name__}")
    _check(batch_norm, conv, example_input)
    check_whole("", model)
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    structure = examine(model, modules)
    sequence, calls = structure.sequence, None
    if conv == "operator" or (structure.untraceable and example_input is not None):
        for path in sequence:
            if kinds.is_layer(modules[path]):
                kinds.weight_of(path, modules[path])
        calls = watch(model, example_input)
        if structure.untraceable:
            sequence = [call.path for call in calls]
    if calls is not None and [call.path for call in calls] != sequence:
        raise ValueError(
            "example_input: expected the calls of layers in the trace of the model "
            f"({len(sequence)} calls), got others ({len(calls)} calls)"
        )
    layers = [i for i, path in enumerate(sequence) if kinds.is_layer(modules[path])]
    norms = [i for i, path in enumerate(sequence) if not kinds.is_layer(modules[path])]
    if not layers:
        raise ValueError("example_input: expected at least one call of a layer, got none")
    has_batch_norm = any(kinds.is_batch_norm(modules[sequence[i]]) for i in norms)
    folds = structure.folds
    if batch_norm == "last" and norms:
        if norms[-1] > layers[-1]:
            name = kinds.described(sequence[norms[-1]], modules[sequence[norms[-1]]])
            raise ValueError(
                'batch_norm: expected "fold" or "affine" because a normalisation follows the last '
                f'layer, got "last" with {name}'
            )
        chosen, folds = [i for i in layers if i > norms[-1]], {}
    elif batch_norm == "affine":
        chosen = [i for i, path in enumerate(sequence) if not _is_other(modules[path])]
        folds = {}
    else:
        chosen = layers
        if has_batch_norm:
            _check_folds(structure, modules)
    # If only the last layer counts, the model scales with it, whatever the modules before do.
    only_last = batch_norm == "last" and bool(norms) and len(chosen) == 1
    _warn(structure, only_last, calls is not None, stacklevel + 1)
    operator = calls if conv == "operator" else None
    weights: dict[str, Tensor] = {}
    found = []
    for i in chosen:
        path = sequence[i]
        if path not in weights:
            weights[path] = _weight(path, modules[path])
        folded = modules[folds[i]] if i in folds else None
        if folded is not None:
            _weight(folds[i], folded)
        call = operator[i] if operator else None
        found.append(Factor(path, modules[path], weights[path], folded, call))
    devices = {factor.weight.device for factor in found}
    if len(devices) > 1:
        raise ValueError(
            f"model: expected all weights on one device, got {', '.join(sorted(map(str, devices)))}"
        )
    return found


def result_dtype(factors: list[Factor]) -> torch.dtype:
    """float64 if a weight is float64, else float32."""
    is_double = any(factor.weight.dtype == torch.float64 for factor in factors)
    return torch.float64 if is_double else torch.float32


def fold_scale(batch_norm: Any) -> Tensor:
    """``[channels]`` in float64, by what a batch norm multiplies the channels in evaluation."""
    scale = (batch_norm.running_var.double() + batch_norm.eps).rsqrt()
    return scale if batch_norm.weight is None else scale * _weight("", batch_norm).double()


def scaled_weight(factor: Factor, dtype: torch.dtype) -> Tensor:
    """The weight with the batch norm folded into it.

    It is in ``dtype``, or in float64 if there is a batch norm: the product may exceed float32.
    """
    if factor.batch_norm is None:
        return factor.weight.to(dtype)
    scale = fold_scale(factor.batch_norm)
    return kinds.scaled(factor.module, factor.weight.double(), scale)


def _weight(path: str, module: Any) -> Tensor:
    if not kinds.is_batch_norm(module):
        return kinds.weight_of(path, module)
    if module.weight is not None:
        return kinds.checked(path, module, module.weight)
    like = module.running_var if module.running_var is not None else torch.empty(0)
    return torch.ones(module.num_features, device=like.device)


def _is_other(module: nn.Module) -> bool:
    return kinds.is_normalization(module) and not kinds.is_batch_norm(module)


def _check(batch_norm: Any, conv: Any, example_input: Any) -> None:
    checks.check_choice("batch_norm", batch_norm, ("fold", "last", "affine"))
    checks.check_choice("conv", conv, ("flattened", "operator"))
    if conv == "operator" and example_input is None:
        raise ValueError(
            'example_input: expected an input of the model because conv="operator" depends on its '
            "size, got None"
        )


def _check_folds(structure: Structure, modules: dict[str, Any]) -> None:
    """Check that every batch norm has statistics and directly follows a layer of the same width."""
    instead = 'use batch_norm="last" or batch_norm="affine" instead'
    if structure.untraceable is not None:
        raise ValueError(
            'model: expected a model that torch.fx can trace for batch_norm="fold", got '
            f"{structure.untraceable}; {instead}"
        )
    expected = "model: expected a layer directly before every batch norm to fold it into"
    if structure.unfoldable is not None:
        raise ValueError(f"{expected}, got {structure.unfoldable}; {instead}")
    for place, path in structure.folds.items():
        norm, layer = modules[path], modules[structure.sequence[place]]
        if norm.running_var is None:
            raise ValueError(
                "model: expected batch norms with running statistics, got "
                f"{kinds.described(path, norm)} without them; {instead}"
            )
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if norm.num_features != outputs:
            raise ValueError(
                f"{expected}, got {kinds.described(path, norm)} with {norm.num_features} features "
                f"after {structure.sequence[place]} with {outputs} outputs; {instead}"
            )


def _warn(structure: Structure, only_last: bool, has_calls: bool, stacklevel: int) -> None:
    if structure.breaking and not only_last:
        warnings.warn(
            "model: margins divided by this norm product depend on the scale of the layers, "
            f"because of {', '.join(structure.breaking)}",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    if structure.untraceable is not None and not has_calls:
        warnings.warn(
            "model: every layer counts once for each name that it is registered under, because "
            f"torch.fx cannot trace the model ({structure.untraceable}); pass example_input to "
            "count the calls instead",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
