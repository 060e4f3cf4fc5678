"""Kinds of modules: which ones have a matrix, and which ones keep the scale of their input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _advice as advice
from .._checks import FLOATING, is_distributed, wraps_tensors
from .._operations import changes_scale

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Normalisations that use statistics of their input in evaluation too.
OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, *_INSTANCE_NORMS)
IDENTITIES = (
    *(nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
# The methods that compute the output of a layer.
_COMPUTING = ("__call__", "forward", "_conv_forward")
# Attributes of a weight that do not depend on its values.
DESCRIBING = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a linear layer or a convolution."""
    return _runs_as(module, LAYERS)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm of any dimension."""
    return _runs_as(module, BATCH_NORMS)


def is_parametric_relu(module: nn.Module) -> bool:
    """Whether the module is a PReLU, whose parameters do not count."""
    return _runs_as(module, (nn.PReLU,))


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has replaced the ``forward`` of this one module."""
    return "forward" in vars(module)


def _runs_as(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the class is, or inherits from, one of ``kinds`` and computes the same."""
    own: Any = type(module)
    if has_own_forward(module) or not issubclass(own, kinds):
        return False
    return any(
        issubclass(own, kind)
        and all(getattr(own, name, None) is getattr(kind, name, None) for name in _COMPUTING)
        for kind in kinds
    )


def is_normalization(module: nn.Module) -> bool:
    """Whether the scale of the module's input has no effect on its output."""
    return is_batch_norm(module) or isinstance(module, OTHER_NORMS)


def keeps_scale(module: nn.Module) -> bool:
    """Whether the output scales with the input in evaluation, as that of a batch norm does.

    Classes that are not PyTorch's are judged by the functions that they call.
    """
    if is_normalization(module):
        return is_batch_norm(module)
    kind = type(module)
    return not (kind.__module__.startswith("torch.nn.") and changes_scale(kind.__name__))


def described(path: str, module: nn.Module) -> str:
    """The name of a module in messages."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    # Users write torch.nn.Linear, not torch.nn.modules.linear.Linear.
    package = "torch.nn" if kind.__module__.startswith("torch.nn.modules.") else kind.__module__
    return f"{path or 'the model itself'} ({package}.{kind.__qualname__})"


def weight_of(path: str, module: Any) -> Tensor:
    """The weight in evaluation. The modules that compute it keep their mode."""
    own = module._parameters
    if not own.keys() <= {"weight", "bias"}:
        raise ValueError(
            f"model: expected weight and bias as the only parameters of {described(path, module)}, "
            f"got {', '.join(sorted(own))} (the reparametrizations of "
            "torch.nn.utils.parametrizations are supported)"
        )
    is_parametrized = parametrize.is_parametrized(module, "weight")
    if not is_parametrized and module._forward_pre_hooks and "weight" not in own:
        raise ValueError(
            f"model: expected the weight of {described(path, module)} to be its parameter, got "
            "a module with hooks before its forward, which may compute the weight"
        )
    if not is_parametrized:
        weight = getattr(module, "weight", None)
    else:
        # In training mode, to read the weight of a spectral norm would run one more iteration.
        training = [part for part in module.parametrizations.modules() if part.training]
        try:
            for part in training:
                part.training = False
            weight = module.weight
        finally:
            for part in training:
                part.training = True
    return checked(path, module, weight)


def checked(path: str, module: nn.Module, weight: Any) -> Tensor:
    """The weight, if it is an ordinary tensor with values in the shape for its module."""
    problem = _problem(module, weight)
    if problem is not None:
        kind, expected, got = problem
        raise kind(f"model: expected the weight of {described(path, module)} {expected}, got {got}")
    is_plain = type(weight) in (Tensor, nn.Parameter)
    return weight if is_plain else weight.as_subclass(Tensor)


def _problem(module: nn.Module, weight: Any) -> tuple[type[Exception], str, str] | None:
    sharded = "; if the model is sharded, gather its whole parameters first"
    if nn.parameter.is_lazy(weight):
        return ValueError, "to be initialized", "a lazy layer before its first input"
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        return TypeError, "to be a dense (strided) tensor", type(weight).__name__
    if is_distributed(weight):
        return TypeError, "to be an ordinary tensor", f"a DTensor; {advice.GATHERED}"
    if wraps_tensors(weight):
        return (
            TypeError,
            "to be an ordinary tensor",
            f"{type(weight).__name__}; {advice.UNQUANTIZED}",
        )
    if weight.dtype not in FLOATING:
        got = str(weight.dtype)
        got = got if weight.is_complex() else f"{got}; {advice.UNQUANTIZED}"
        return TypeError, "to be of a real floating-point dtype", got
    if weight.is_meta:
        return ValueError, "to have values", "a tensor on the meta device"
    if weight.numel() == 0:
        return ValueError, "to have elements", f"shape {list(weight.shape)}{sharded}"
    if weight.dim() != _dimensions(module):
        return (
            ValueError,
            f"to have {_dimensions(module)} dimensions",
            f"shape {list(weight.shape)}{sharded}",
        )
    return None


def _dimensions(module: Any) -> int:
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
        return 2 + len(module.kernel_size)
    return 2 if isinstance(module, nn.Linear) else 1


def blocks(module: Any, weight: Tensor) -> Tensor:
    """The blocks ``[groups, rows, columns]`` of the block-diagonal matrix, one row per output.

    The matrix of a batch norm is diagonal.
    """
    if is_batch_norm(module):
        return weight.reshape(-1, 1, 1)
    if isinstance(module, TRANSPOSED):
        split = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return split.flatten(2)
    return weight.reshape(getattr(module, "groups", 1), -1, weight[0].numel())


def rows(module: Any, weight: Tensor) -> Tensor:
    """The rows ``[outputs, columns]`` of all blocks, with the columns in any order.

    The norm of a row does not depend on the order of its columns. So a dense weight is not copied.
    """
    if isinstance(module, TRANSPOSED) or weight.dim() < 3:
        return blocks(module, weight).flatten(0, 1)
    if weight.is_contiguous():
        return weight.flatten(1)
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    return weight.permute(0, *order).flatten(1)


def scaled(module: Any, weight: Tensor, scale: Tensor) -> Tensor:
    """``weight`` with the part of each output multiplied by its entry of ``scale``."""
    if isinstance(module, TRANSPOSED):
        by_group = weight.unflatten(0, (module.groups, -1))
        factor = scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))
        return (by_group * factor).flatten(0, 1)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
