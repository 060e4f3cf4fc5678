"""Argument checks. Each error names the argument, what was expected and what came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    is_traceable_wrapper_subclass,
)

from . import _advice as advice

ORDINARY = Tensor, torch.nn.Parameter
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOATING_NAMES = "float32, float64, bfloat16 or float16"


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and results: float64 for float64 arguments, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: Any, dim: int, shape: str, or_more: bool = False) -> None:
    """Check that ``value`` is a strided floating-point tensor of ``dim`` dimensions, or more."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor {shape}, got {type(value).__name__}"
            f"{advice.for_object(name, value)}"
        )
    if type(value) not in ORDINARY:
        check_not_distributed(name, value)
    is_right = value.dim() == dim or (or_more and value.dim() > dim)
    if (
        is_right
        and value.dtype in FLOATING
        and value.layout == torch.strided
        and not value.is_nested
    ):
        return
    _check_layout(name, value)
    if not is_right:
        raise ValueError(
            f"{name}: expected shape {shape}, got {list(value.shape)}"
            f"{advice.for_shape(name, value, dim)}"
        )
    raise TypeError(
        f"{name}: expected dtype {_FLOATING_NAMES}, got {value.dtype}"
        f"{advice.for_dtype(name, value)}"
    )


def _check_layout(name: str, value: Tensor) -> None:
    """Check that a tensor is strided. Nested tensors may call themselves strided."""
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(
            f"{name}: expected a dense (strided) tensor, got {kind}{advice.for_layout(name, value)}"
        )


def check_not_distributed(name: str, value: Tensor) -> None:
    """Check that ``value`` is not a DTensor, whose elements may be on several processes."""
    if type(value) not in ORDINARY and is_distributed(value):
        raise TypeError(
            f"{name}: expected an ordinary tensor, got a DTensor; pass {name}.full_tensor()"
        )


def is_ordinary(value: Any) -> bool:
    """Whether a value is a tensor of no subclass; a DTensor is one of a subclass."""
    return type(value) in ORDINARY


def is_distributed(value: Tensor) -> bool:
    """Whether a tensor is a DTensor. No other tensor has ``full_tensor``."""
    return hasattr(value, "full_tensor")


def wraps_tensors(value: Tensor) -> bool:
    """Whether a tensor has memory of another form than its dtype and shape say."""
    # An ordinary tensor, also one of a subclass that only changes functions, has no dispatch.
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_int(name: str, value: Any, least: int | None = None) -> None:
    """Check that ``value`` is an int or a ``torch.SymInt`` that is at least ``least``."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(
            f"{name}: expected an int, got {type(value).__name__}{advice.for_int(name, value)}"
        )
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        *most, last = (f'"{choice}"' for choice in choices)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_device(name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Check that ``value`` is on the device of ``like``."""
    if value.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} as {like_name}, got {value.device}; "
            f'move it with .to("{like.device}")'
        )


def has_values(tensor: Tensor) -> bool:
    """Whether Python may read values here: not in graphs that are traced, nor in vmap."""
    return (
        not torch.compiler.is_compiling()
        and not tensor.is_meta
        and not isinstance(tensor, FakeTensor)
        and not is_traceable_wrapper_subclass(tensor)
        and not torch._C._get_tracing_state()
        and torch._C._functorch.peek_interpreter_stack() is None
        and _get_current_dispatch_mode() is None
    )


def check_target(
    target: Any,
    like: Tensor,
    ignore_index: Any,
    like_name: str = "logits",
    name: str = "target",
    dims: int = 1,
) -> None:
    """Check targets [N] int64, one for each row of ``like``, and an integer ``ignore_index``.

    The targets have the shape of the first ``dims`` dimensions of ``like``.
    """
    if (
        type(target) in ORDINARY
        and target.dtype == torch.int64
        and target.layout == torch.strided
        and not target.is_nested
        and target.shape == like.shape[:dims]
        and target.device == like.device
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
    ):
        return
    if not isinstance(target, Tensor):
        raise TypeError(
            f"{name}: expected a tensor [N], got {type(target).__name__}"
            f"{advice.for_object(name, target)}"
        )
    check_not_distributed(name, target)
    _check_layout(name, target)
    if target.dtype != torch.int64 or target.shape != like.shape[:dims]:
        todo = (
            advice.for_target(name, target, like.shape[0])
            if dims == 1
            else advice.for_target_of_rows(name, target, like_name, like.shape)
        )
        if target.dtype != torch.int64:
            raise TypeError(
                f"{name}: expected dtype torch.int64 (class indices), got {target.dtype} of shape "
                f"{list(target.shape)}{todo}"
            )
        raise ValueError(
            f"{name}: expected shape {list(like.shape[:dims])} for {like_name} "
            f"{list(like.shape)}, got {list(target.shape)}{todo}"
        )
    check_device(name, target, like, like_name)
    check_int("ignore_index", ignore_index)
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"ignore_index: expected an int in [-2**63, 2**63), as in int64, got {ignore_index}"
        )


def check_indices(name: str, value: Any, shape: str) -> None:
    """Check a tensor of int64 indices; ``shape`` is for the error alone."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a tensor {shape}, got {type(value).__name__}"
            f"{advice.for_object(name, value)}"
        )
    if value.dtype != torch.int64:
        todo = "" if value.dtype == torch.bool else f"; pass {name}.long()"
        if value.is_floating_point():
            todo = "; take integers from the data set, because large ones lose digits here"
        raise TypeError(f"{name}: expected dtype torch.int64, got {value.dtype}{todo}")
    if value.dim() != 1:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
