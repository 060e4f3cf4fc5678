"""Argument checks. Each error names the argument, what was expected and what came."""

import operator
import warnings
from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode,
    is_traceable_wrapper_subclass,
)

from . import _advice as advice

_ORDINARY = Tensor, torch.nn.Parameter
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
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
    if type(value) not in _ORDINARY:
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
    if type(value) not in _ORDINARY and is_distributed(value):
        raise TypeError(
            f"{name}: expected an ordinary tensor, got a DTensor; pass {name}.full_tensor()"
        )


def is_ordinary(value: Any) -> bool:
    """Whether a value is a tensor of no subclass; a DTensor is one of a subclass."""
    return type(value) in _ORDINARY


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


def check_logits(logits: Any, or_more: bool = False) -> None:
    """Check logits [N, C], C >= 2, or [..., N, C] with ``or_more``."""
    rows = "..., N" if or_more else "N"
    check_tensor("logits", logits, 2, f"[{rows}, C]", or_more)
    if logits.shape[-1] < 2:
        raise ValueError(
            f"logits: expected at least 2 classes [{rows}, C >= 2], got {[*logits.shape]}"
            f"{advice.for_one_column(logits)}"
        )


def check_labelled_logits(
    logits: Any, target: Any, ignore_index: Any, or_more: bool = False
) -> None:
    """Check logits [N, C], C >= 2, their targets [N] and an integer ``ignore_index``.

    With ``or_more``, logits may also be [..., N, C]. Their targets are [..., N] then.
    """
    # Right arguments, in one look. The other checks find out what is wrong.
    if (
        type(logits) in _ORDINARY
        and type(target) in _ORDINARY
        and not (logits.is_nested or target.is_nested)
        and logits.layout == target.layout == torch.strided
        and logits.dtype in FLOATING
        and target.dtype == torch.int64
        and logits.dim() == 2
        and target.dim() == 1
        and logits.shape[0] == target.numel()
        and logits.shape[1] >= 2
        and logits.device == target.device
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
    ):
        return
    check_logits(logits, or_more)
    check_target(target, logits, ignore_index, dims=logits.dim() - 1)


_looks = 16  # how many more calls of this process look at their logits


def warn_of_probabilities(logits: Tensor) -> None:
    """Warn the caller's caller if ``logits`` look like probabilities, once in a process.

    Only the first calls of a process look, at a few rows on the CPU. Graphs and transformations
    have no values to look at.
    """
    global _looks
    # A compiled graph must not read the number, or it is compiled again for each number.
    if torch.compiler.is_compiling() or _looks <= 0 or logits.device.type != "cpu":
        return
    if not has_values(logits):
        return
    _looks -= 1
    rows = logits.detach()
    while rows.dim() > 2:
        rows = rows[:1].flatten(0, 1)
    rows = rows[:8].double()
    tolerance = max(torch.finfo(logits.dtype).eps, 1e-4)
    positive = torch.where(rows > 0, rows, torch.inf).amin(1)
    # Rows such as (0, 1, 0) or (0.5, 0.5) hold one value beside 0: they may well be logits.
    differ = (positive < rows.amax(1) - tolerance).any() if len(rows) else torch.tensor(False)
    if differ and (rows >= 0).all() and ((rows.sum(1) - 1).abs() <= tolerance).all():
        _looks = 0
        warnings.warn(
            "logits: each row is non-negative and sums to 1, so these look like probabilities; "
            "pass the logits, the input of the softmax (log(p) works)",
            UserWarning,
            stacklevel=3,
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
        type(target) in _ORDINARY
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


def check_features(input: Any, logits: Tensor) -> None:
    """Check features [N, D] or [..., N, D], one row for each row of ``logits``."""
    or_more = logits.dim() > 2
    check_tensor("input", input, 2, "[..., N, D]" if or_more else "[N, D]", or_more)
    if input.shape[:-1] != logits.shape[:-1]:
        rows = list(logits.shape[:-1]) if or_more else logits.shape[0]
        raise ValueError(
            f"input: expected {rows} rows for logits {list(logits.shape)}, "
            f"got shape {list(input.shape)}"
        )
    check_device("input", input, logits, "logits")


def check_weight(weight: Any, logits: Tensor) -> None:
    """Check a weight [C, D] in the dtype of ``logits``, or float32 for half-precision logits."""
    check_tensor("weight", weight, 2, "[C, D]")
    if weight.shape[0] != logits.shape[-1]:
        raise ValueError(
            f"weight: expected {logits.shape[-1]} rows for logits {list(logits.shape)}, "
            f"got shape {list(weight.shape)}"
            f"{advice.for_transposed('weight', weight, logits.shape[-1], None)}"
        )
    check_device("weight", weight, logits, "logits")
    if weight.dtype != logits.dtype and weight.dtype != result_dtype(logits.dtype):
        expected = " or ".join(
            str(dtype) for dtype in dict.fromkeys((logits.dtype, result_dtype(logits.dtype)))
        )
        raise TypeError(
            f"weight: expected dtype {expected} for logits of {logits.dtype}, got {weight.dtype}; "
            "convert one of the two with .to()"
        )


def check_bias(bias: Any, weight: Tensor) -> None:
    """Check a bias [C] in the dtype of ``weight``."""
    check_bias_shape(bias, weight)
    if bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected dtype {weight.dtype} as weight, got {bias.dtype}")


def check_bias_shape(bias: Any, weight: Tensor) -> None:
    """Check a bias [C] for ``weight``, in any dtype."""
    check_tensor("bias", bias, 1, "[C]")
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(
            f"bias: expected shape [{weight.shape[0]}] for weight {list(weight.shape)}, "
            f"got {list(bias.shape)}"
        )
    check_device("bias", bias, weight, "weight")


def check_bias_in_norm(bias: Any, bias_in_norm: Any) -> None:
    """Check that there is a bias if it is to be part of the norm."""
    if bias_in_norm and bias is None:
        raise ValueError("bias: expected a tensor [C] because bias_in_norm=True, got None")


def check_k(k: Any, count: int, counted: str) -> int:
    """Check an integer k in [0, count]. The integers of compiled graphs stay symbolic."""
    k = as_k(k)
    if k < 0 or k > count:
        raise ValueError(f"k: expected 0 <= k <= {count} (the number of {counted}), got {k}")
    return k


def as_k(k: Any) -> int:
    """Check that k is an integer of any library, and make it an int."""
    if type(k) is not int and not isinstance(k, torch.SymInt):
        if isinstance(k, bool) or not isinstance(k, SupportsIndex):
            raise TypeError(f"k: expected an int, got {type(k).__name__}{advice.for_k(k)}")
        if isinstance(k, Tensor) and (k.dtype not in _INTEGERS or k.numel() != 1):
            raise TypeError(
                f"k: expected an int, got a tensor {list(k.shape)} of {k.dtype}{advice.for_k(k)}"
            )
        k = operator.index(k)
    return k


def as_log_norm(log_norm: Any, logits: Tensor) -> Tensor | None:
    """Convert a number or 0-d tensor to a 0-d tensor of the result dtype; None stays None."""
    if log_norm is None:
        return None
    dtype = result_dtype(logits.dtype)
    if not isinstance(log_norm, Tensor):
        if isinstance(log_norm, bool) or not isinstance(log_norm, (int, float)):
            raise TypeError(
                f"log_norm: expected a float or a 0-d tensor, got {type(log_norm).__name__}"
                f"{advice.for_float('log_norm', log_norm)}"
            )
        # On the CPU for logits on any device: kernels take the number by value, without a copy.
        return torch.tensor(log_norm, dtype=dtype, device="cpu")
    check_tensor("log_norm", log_norm, 0, "[] (0-d)")
    check_device("log_norm", log_norm, logits, "logits")
    return log_norm.to(dtype)


def check_linear(input: Any, weight: Any, bias: Any, or_more: bool = False) -> torch.dtype | None:
    """Check features [N, D], weight [C, D] and bias [C], as ``F.linear`` takes them.

    With ``or_more``, features may also be [..., N, D].

    Returns:
        The dtype of the matrix product under autocast; None without autocast.
    """
    check_tensor("input", input, 2, "[..., N, D]" if or_more else "[N, D]", or_more)
    check_tensor("weight", weight, 2, "[C, D]")
    if weight.shape[1] != input.shape[-1]:
        if input.dim() > 2 and input[:1].numel() == weight.shape[1]:
            raise ValueError(
                f"input: expected {weight.shape[1]} columns for weight {list(weight.shape)}, "
                f"got shape {list(input.shape)}; pass input.flatten(1) if only the first "
                "dimension counts the samples"
            )
        raise ValueError(
            f"weight: expected {input.shape[-1]} columns for input {list(input.shape)}, "
            f"got shape {list(weight.shape)}"
            f"{advice.for_width(weight, input.shape[-1])}"
        )
    check_device("weight", weight, input, "input")
    if bias is not None:
        check_bias_shape(bias, weight)
    others = [("weight", weight)] if bias is None else [("weight", weight), ("bias", bias)]
    # The meta device has no autocast: is_autocast_enabled raises an error for it.
    autocast = not input.is_meta and torch.is_autocast_enabled(input.device.type)
    for name, value in others:
        # Autocast does not cast float64. It casts all other dtypes to one dtype.
        same_kind = torch.float64 not in (value.dtype, input.dtype)
        if value.dtype != input.dtype and not (autocast and same_kind):
            raise TypeError(f"{name}: expected dtype {input.dtype} as input, got {value.dtype}")
    if autocast and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return None


def check_temperature(temperature: Any) -> None:
    """Check a positive and finite number."""
    if not isinstance(temperature, (int, float, torch.SymFloat)) or isinstance(temperature, bool):
        raise TypeError(
            f"temperature: expected a float, got {type(temperature).__name__}"
            f"{advice.for_float('temperature', temperature)}"
        )
    if not 0 < temperature <= torch.finfo(torch.float64).max:
        raise ValueError(
            f"temperature: expected a finite number above 0, got {temperature}; "
            "the limit 0 is the class of the largest logit"
        )


def check_classes(weight: Tensor) -> None:
    """Check that a weight has at least two rows."""
    if weight.shape[0] < 2:
        raise ValueError(
            f"weight: expected at least 2 classes [C >= 2, D], got {[*weight.shape]}"
            f"{advice.for_one_row(weight)}"
        )


def checked_target(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Check that targets are classes in [0, classes) or ``ignore_index``.

    Returns:
        Which samples are ignored, and the targets with class 0 for ignored samples.
    """
    ignored = target == ignore_index
    valid = ((target >= 0) & (target < classes)) | ignored
    if target.is_cuda:
        torch._assert_async(valid.all())
    elif not valid.all():
        wrong = target[~valid][0].item()
        raise RuntimeError(
            f"target: expected classes in [0, {classes}) or ignore_index {ignore_index}, "
            f"got {wrong}"
        )
    return ignored, torch.where(ignored, 0, target)
