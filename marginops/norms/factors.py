"""The matrices of a model whose norms are multiplied."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks as checks
from . import layers as kinds
from .structure import Call, Structure, structure_of, watch

BatchNorm = Literal["fold", "last", "affine"]
Convolution = Literal["flattened", "operator"]
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Factor(NamedTuple):
    """One matrix: a layer's, once for each use, or the diagonal one of a batch norm."""

    path: str
    module: Any  # nn.Module, whose attributes have no types
    weight: Tensor
    batch_norm: Any  # folded into the rows; None if there is none
    call: Call | None  # with conv="operator"

    @property
    def name(self) -> str:
        """What messages call it."""
        return kinds.described(self.path, self.module)

    @property
    def is_operator(self) -> bool:
        """Whether its matrix is that of the convolution on all places of its input."""
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
    """The matrices that count, in order; warns where their product is no scale of the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module, got {type(model).__name__}")
    _check(batch_norm, conv, example_input)
    while hasattr(model, "_orig_mod") or isinstance(model, _PARALLEL):
        # What torch.compile wraps, or one of these.
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    modules = kinds.modules_of(model)
    structure = structure_of(model, modules)
    sequence, calls = structure.sequence, None
    if conv == "operator" or (structure.untraceable and example_input is not None):
        calls = watch(model, example_input)
        if structure.untraceable:
            sequence = [call.path for call in calls]
    if calls is not None and [call.path for call in calls] != sequence:
        raise ValueError(
            "example_input: expected the layers to run as in the trace of the model, "
            f"got {len(calls)} calls instead of {len(sequence)}"
        )
    layers = [i for i, path in enumerate(sequence) if kinds.is_layer(modules[path])]
    norms = [i for i, path in enumerate(sequence) if not kinds.is_layer(modules[path])]
    if not layers:
        raise ValueError("example_input: expected it to reach a layer, got no call of any")
    has_batch_norm = any(kinds.is_batch_norm(modules[sequence[i]]) for i in norms)
    folds = structure.folds
    if batch_norm == "last" and norms:
        if norms[-1] > layers[-1]:
            name = kinds.described(sequence[norms[-1]], modules[sequence[norms[-1]]])
            raise ValueError(
                'batch_norm: expected "fold" or "affine" where a normalisation follows the last '
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
    # One last layer's scale is the model's whatever those before it do.
    is_free = batch_norm == "last" and bool(norms) and len(chosen) == 1
    _warn(structure, is_free, calls is not None, stacklevel + 1)
    operator = calls if conv == "operator" else None
    weights: dict[str, Tensor] = {}
    found = []
    for i in chosen:
        path = sequence[i]
        if path not in weights:
            weights[path] = _weight(path, modules[path])
        folded = modules[folds[i]] if i in folds else None
        call = operator[i] if operator else None
        found.append(Factor(path, modules[path], weights[path], folded, call))
    devices = {factor.weight.device for factor in found}
    if len(devices) > 1:
        raise ValueError(
            f"model: expected all weights on one device, got {', '.join(sorted(map(str, devices)))}"
        )
    return found


def result_dtype(factors: list[Factor]) -> torch.dtype:
    """float64 if a weight is, else float32."""
    is_double = any(factor.weight.dtype == torch.float64 for factor in factors)
    return torch.float64 if is_double else torch.float32


def fold_scale(batch_norms: list[Any]) -> Tensor:
    """What each batch norm multiplies its channels by in evaluation, one after the other."""
    variance = torch.cat([norm.running_var for norm in batch_norms]).double()
    sizes = [norm.num_features for norm in batch_norms]
    eps = np.repeat([norm.eps for norm in batch_norms], sizes)
    scale = (variance + torch.from_numpy(eps).to(variance.device)).rsqrt()
    if all(norm.weight is None for norm in batch_norms):
        return scale
    return scale * torch.cat([_weight("", norm) for norm in batch_norms]).double()


def scaled_weight(factor: Factor, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype with the batch norm folded into it."""
    weight = factor.weight.to(dtype)
    if factor.batch_norm is None:
        return weight
    return kinds.scaled(factor.module, weight, fold_scale([factor.batch_norm]))


def _weight(path: str, module: Any) -> Tensor:
    if not kinds.is_batch_norm(module):
        return kinds.weight_of(path, module)
    if module.weight is not None:
        return module.weight
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
    """Every batch norm has statistics and a layer of as many outputs directly before it."""
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
                f"{kinds.described(path, norm)} without; {instead}"
            )
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if norm.num_features != outputs:
            raise ValueError(
                f"{expected}, got {kinds.described(path, norm)} of {norm.num_features} features "
                f"after {structure.sequence[place]} of {outputs} outputs; {instead}"
            )


def _warn(structure: Structure, is_free: bool, has_calls: bool, stacklevel: int) -> None:
    if structure.breaking and not is_free:
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
