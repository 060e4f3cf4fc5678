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
from .unsupported import check_not_compiled_or_sharded

BatchNorm = Literal["fold", "last", "affine"]
Convolution = Literal["flattened", "operator"]


class Factor(NamedTuple):
    """The matrix of one call of a layer, or the diagonal matrix of a batch norm.

    Attributes:
        call: The call.
        weight: The weight of its module.
        batch_norm: The batch norm that is folded into the rows; None if there is none.
        is_operator: Whether the matrix maps the whole input of a convolution to its whole output.
    """

    call: Call
    weight: Tensor
    batch_norm: Any
    is_operator: bool

    @property
    def module(self) -> Any:
        """The layer or batch norm."""
        return self.call.module


def factors_of(
    model: Any, batch_norm: Any, conv: Any, example_input: Any, stacklevel: int
) -> list[Factor]:
    """The matrices that count, in the order of their calls.

    The function warns if the model does not scale with the product of their norms.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check(batch_norm, conv, example_input)
    check_not_compiled_or_sharded("", model)
    model = unwrap(model)
    structure = examine(model)
    is_untraceable = structure.untraceable is not None
    runs = conv == "operator" or (is_untraceable and example_input is not None)
    calls = _ran(model, structure, example_input) if runs else structure.calls
    norms = [i for i, call in enumerate(calls) if not kinds.is_layer(call.module)]
    if len(norms) == len(calls):
        raise ValueError("example_input: expected at least one call of a layer, got none")
    if batch_norm == "fold":
        _check_folds(structure, [calls[i] for i in norms])
    if batch_norm == "affine":
        chosen = [call for call in calls if not _is_other_normalization(call.module)]
    elif batch_norm == "last" and norms:
        chosen = calls[norms[-1] + 1 :]
        if not chosen:
            raise ValueError(
                'batch_norm: expected "fold" or "affine" because a normalisation follows the last '
                f'layer, got "last" with {calls[-1].name}'
            )
    else:
        chosen = [call for call in calls if kinds.is_layer(call.module)]
    # If only the last layer counts, the model scales with it, whatever the modules before do.
    only_last = batch_norm == "last" and bool(norms) and len(chosen) == 1
    _warn(structure, only_last, runs, stacklevel + 1)
    modules = {call.path: call.module for call in chosen}
    weights = {path: _weight(path, module) for path, module in modules.items()}
    convolutions = (*kinds.CONVOLUTIONS, *kinds.TRANSPOSED)
    found = []
    for call in chosen:
        norm = call.batch_norm if batch_norm == "fold" else None
        if norm is not None:
            _weight(norm.path, norm.module)
        is_operator = conv == "operator" and isinstance(call.module, convolutions)
        found.append(Factor(call, weights[call.path], norm and norm.module, is_operator))
    devices = {factor.weight.device for factor in found}
    if len(devices) > 1:
        raise ValueError(
            f"model: expected all weights on one device, got {', '.join(sorted(map(str, devices)))}"
        )
    return found


def _ran(model: nn.Module, structure: Structure, example_input: Any) -> list[Call]:
    """The calls with the shapes of their inputs and outputs."""
    for call in structure.calls:
        if kinds.is_layer(call.module):
            kinds.weight_of(call.path, call.module)
    ran = watch(model, example_input)
    if structure.untraceable:
        return ran
    if [call.path for call in ran] != [call.path for call in structure.calls]:
        raise ValueError(
            "example_input: expected the calls of layers in the trace of the model "
            f"({len(structure.calls)} calls), got others ({len(ran)} calls)"
        )
    for call, other in zip(structure.calls, ran, strict=True):
        call.shapes = other.shapes
    return structure.calls


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


def _is_other_normalization(module: nn.Module) -> bool:
    return kinds.is_normalization(module) and not kinds.is_batch_norm(module)


def _check(batch_norm: Any, conv: Any, example_input: Any) -> None:
    checks.check_choice("batch_norm", batch_norm, ("fold", "last", "affine"))
    checks.check_choice("conv", conv, ("flattened", "operator"))
    if conv == "operator" and example_input is None:
        raise ValueError(
            'example_input: expected an input of the model because conv="operator" depends on its '
            "size, got None"
        )


def _check_folds(structure: Structure, norms: list[Call]) -> None:
    """Check that every batch norm has statistics and directly follows a layer of the same width."""
    if not any(kinds.is_batch_norm(call.module) for call in norms):
        return
    instead = 'use batch_norm="last" or batch_norm="affine" instead'
    if structure.untraceable is not None:
        raise ValueError(
            'model: expected a model that torch.fx can trace for batch_norm="fold", got '
            f"{structure.untraceable}; {instead}"
        )
    expected = "model: expected a layer directly before every batch norm to fold it into"
    if structure.unfoldable is not None:
        raise ValueError(f"{expected}, got {structure.unfoldable}; {instead}")
    for call in structure.calls:
        if call.batch_norm is None:
            continue
        layer, norm = call.module, call.batch_norm.module
        if norm.running_var is None:
            raise ValueError(
                "model: expected batch norms with running statistics, got "
                f"{call.batch_norm.name} without them; {instead}"
            )
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if norm.num_features != outputs:
            raise ValueError(
                f"{expected}, got {call.batch_norm.name} with {norm.num_features} features "
                f"after {call.path} with {outputs} outputs; {instead}"
            )


def _warn(structure: Structure, only_last: bool, has_run: bool, stacklevel: int) -> None:
    if structure.breaking and not only_last:
        warnings.warn(
            "model: margins divided by this norm product depend on the scale of the layers, "
            f"because of {', '.join(structure.breaking)}",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
    if structure.untraceable is not None and not has_run:
        warnings.warn(
            "model: every layer counts once for each name that it is registered under, because "
            f"torch.fx cannot trace the model ({structure.untraceable}); pass example_input to "
            "count the calls instead",
            UserWarning,
            stacklevel=stacklevel + 1,
        )
