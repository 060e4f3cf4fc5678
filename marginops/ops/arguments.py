"""Checks of logits, last layers and selections, for every function that takes them."""

import operator
import warnings
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .. import _advice as advice
from .._checks import (
    FLOATING,
    ORDINARY,
    check_device,
    check_target,
    check_tensor,
    has_values,
    result_dtype,
)

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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
        type(logits) in ORDINARY
        and type(target) in ORDINARY
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
