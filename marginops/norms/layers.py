"""Kinds of modules: which have a matrix, which keep the scale of their input, which do not."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._checks import FLOATING

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# They normalise by what they get, in evaluation too.
OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm, *_INSTANCE_NORMS)
_OF_EVERY_DIMENSION = (
    *("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool", "LPPool", "MaxUnpool"),
    *("ReflectionPad", "ReplicationPad", "ZeroPad", "CircularPad", "Dropout"),
)
IDENTITIES = (
    *(nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
HOMOGENEOUS = (
    *IDENTITIES,
    *(getattr(nn, f"{kind}{n}d") for kind in _OF_EVERY_DIMENSION for n in (1, 2, 3)),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.Upsample),
    *(nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU),
    *(nn.Flatten, nn.Unflatten, nn.Fold, nn.Unfold),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict),
)
# Functions and methods of tensors that do not keep the scale of their input, as a trace names them,
# without the underscore at the end of those in place.
BREAKING_FUNCTIONS = {
    *("tanh", "sigmoid", "logsigmoid", "log_sigmoid", "special_expit", "gelu", "silu", "mish"),
    *("elu", "selu", "celu", "glu", "softplus", "softsign", "hardtanh", "relu6", "hardswish"),
    *("hardsigmoid", "tanhshrink", "softshrink", "hardshrink", "threshold", "_threshold"),
    *("softmax", "log_softmax", "softmin", "gumbel_softmax", "logsumexp", "batch_norm"),
    *("layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "normalize"),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "atan", "erf"),
    *("pow", "square", "sqrt", "rsqrt", "reciprocal", "scaled_dot_product_attention"),
}
# A weight is not used by who asks for these.
DESCRIBING = ("shape", "dtype", "device", "ndim", "is_cuda", "requires_grad")


def is_layer(module: nn.Module) -> bool:
    """A linear layer or convolution."""
    kind: Any = type(module)
    return _runs_as(kind, LAYERS)


def is_batch_norm(module: nn.Module) -> bool:
    """A batch norm of any dimension."""
    kind: Any = type(module)
    return _runs_as(kind, BATCH_NORMS)


@functools.lru_cache(maxsize=1024)
def _runs_as(own: type[nn.Module], kinds: tuple[type[nn.Module], ...]) -> bool:
    """A subclass of one of these whose forward is that of PyTorch."""
    return any(issubclass(own, kind) and own.forward is kind.forward for kind in kinds)


def is_normalization(module: nn.Module) -> bool:
    """Any layer that makes the scale of what it gets irrelevant."""
    return is_batch_norm(module) or isinstance(module, OTHER_NORMS)


def keeps_scale(module: nn.Module) -> bool:
    """Whether scaling the input scales the output, as far as the type tells."""
    if isinstance(module, HOMOGENEOUS):
        return True
    if type(module).__module__.startswith(("torch.nn.", "torch.ao.")):
        return next(module.children(), None) is not None
    # Somebody's own module holds others, or is a function that a trace looks into.
    has_others = next(module.children(), None) is not None
    return has_others or next(module.buffers(recurse=False), None) is None


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """By path, those under several names by each; as ``named_modules``, in a fraction of its time.

    It is part of every call, beside one reading of the weights.
    """
    found, waiting = {}, [("", model)]
    while waiting:
        path, module = waiting.pop()
        found[path] = module
        for name, child in reversed(module._modules.items()):
            if child is not None:
                waiting.append((f"{path}.{name}" if path else name, child))
    return found


def described(path: str, module: nn.Module) -> str:
    """How messages name a module."""
    kind = type(module)
    if parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    # nn.Linear lives in torch.nn.modules.linear, which nobody writes.
    where = "torch.nn" if kind.__module__.startswith("torch.nn.modules.") else kind.__module__
    return f"{path or 'the model itself'} ({where}.{kind.__qualname__})"


def weight_of(path: str, module: Any) -> Tensor:
    """The weight as it is in evaluation; whoever computes it is left as it was."""
    own = module._parameters
    if not own.keys() <= {"weight", "bias"}:
        raise ValueError(
            f"model: expected weight and bias as the only parameters of {described(path, module)}, "
            f"got {', '.join(sorted(own))} (the reparametrizations of "
            "torch.nn.utils.parametrizations are understood)"
        )
    if "weight" in own:
        weight = own["weight"]
    else:
        # Spectral normalisation would go on iterating if it were read in training.
        training = [part for part in module.parametrizations.modules() if part.training]
        try:
            for part in training:
                part.training = False
            weight = module.weight
        finally:
            for part in training:
                part.training = True
    problem = _problem(weight)
    if problem is not None:
        kind, expected, got = problem
        raise kind(f"model: expected the weight of {described(path, module)} {expected}, got {got}")
    return weight


def _problem(weight: Any) -> tuple[type[Exception], str, str] | None:
    if nn.parameter.is_lazy(weight):
        return ValueError, "to be initialized", "a lazy layer before its first input"
    if not isinstance(weight, Tensor) or weight.layout != torch.strided:
        return TypeError, "to be a dense (strided) tensor", type(weight).__name__
    if weight.dtype not in FLOATING:
        return TypeError, "to be of a real floating-point dtype", str(weight.dtype)
    if weight.numel() == 0:
        return ValueError, "to have elements", f"shape {list(weight.shape)}"
    if weight.is_meta:
        return ValueError, "to have values", "a tensor on the meta device"
    return None


def blocks(module: Any, weight: Tensor) -> Tensor:
    """[groups, rows, columns]: the blocks of the block-diagonal matrix, a row for each output.

    The weight of a batch norm is a diagonal matrix.
    """
    if is_batch_norm(module):
        return weight.reshape(-1, 1, 1)
    if isinstance(module, TRANSPOSED):
        split = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return split.flatten(2)
    return weight.reshape(getattr(module, "groups", 1), -1, weight[0].numel())


def rows(module: Any, weight: Tensor) -> Tensor:
    """[outputs, columns]: the rows of all blocks, in any order of columns, without a copy if dense.

    Nothing that reads rows one by one cares for the order within them.
    """
    if isinstance(module, TRANSPOSED) or weight.dim() < 3:
        return blocks(module, weight).flatten(0, 1)
    if weight.is_contiguous():
        return weight.flatten(1)
    order = sorted(range(1, weight.dim()), key=weight.stride, reverse=True)
    return weight.permute(0, *order).flatten(1)


def scaled(module: Any, weight: Tensor, scale: Tensor | None) -> Tensor:
    """``weight`` with each output's part times its entry of ``scale``."""
    if scale is None:
        return weight
    scale = scale.to(weight.dtype)
    if isinstance(module, TRANSPOSED):
        by_group = weight.unflatten(0, (module.groups, -1))
        factor = scale.view(module.groups, 1, -1, *[1] * (weight.dim() - 2))
        return (by_group * factor).flatten(0, 1)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1))
