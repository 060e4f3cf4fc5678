"""What to do about a wrong argument: the last part of an error. Only code that raises calls this.

A function ``for_...`` returns ``"; do this"``, or nothing where there is no advice.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_BINARY = (
    "torch.stack([-z / 2, z / 2], -1), which makes the margin z for class 1 and -z for class 0"
)

# What to do with a sharded model, and with one of quantised layers.
GATHERED = (
    "gather each one with full_tensor(), or load a full state dict into a model that is not sharded"
)
UNQUANTIZED = "measure the model before it is quantised, or dequantise it"


def for_object(name: str, value: Any) -> str:
    """Advice for an object that is no tensor."""
    if isinstance(value, nn.Module):
        return _for_module(name, value)
    if name == "logits" and isinstance(getattr(value, "logits", None), Tensor):
        return f"; pass .logits of this {type(value).__name__}"
    if isinstance(value, Mapping):
        return f'; pass {name}["{name}"]' if name in value else ""
    if isinstance(value, (torch.utils.data.DataLoader, torch.utils.data.Dataset, Iterator)):
        return f"; pass {name} of one batch, a tensor"
    if hasattr(value, "_fields"):  # a named tuple, as the results of this package are
        return f"; pass one of its fields ({', '.join(value._fields)})"
    if isinstance(value, (tuple, list)):
        return _for_sequence(name, value)
    if hasattr(value, "to_numpy"):
        return f"; pass torch.as_tensor({name}.to_numpy())"
    return f"; pass torch.as_tensor({name})" if hasattr(value, "__array__") else ""


def _for_module(name: str, module: nn.Module) -> str:
    if name not in ("weight", "bias"):
        return "; pass the output of this module, a tensor"
    value = getattr(module, name, None)
    if isinstance(value, Tensor):
        return f"; pass .{name} of this layer"
    if callable(value):  # a quantized layer
        return f"; pass .{name}().dequantize() of this layer"
    return f"; pass .{name} of its last layer"


def _for_sequence(name: str, value: Any) -> str:
    if not any(isinstance(item, Tensor) for item in value):
        return f"; pass torch.as_tensor({name})"
    if isinstance(value, list) and len({getattr(item, "shape", None) for item in value}) == 1:
        return f"; pass torch.stack({name}), or torch.cat({name}) if its elements are batches"
    return f"; pass the one of its {len(value)} elements that is the tensor {name}"


def for_layout(name: str, value: Tensor) -> str:
    """Advice for a tensor that is not strided."""
    if value.is_nested:
        return f"; pass torch.cat({name}.unbind())"
    return f"; pass {name}.to_dense()"


def for_shape(name: str, value: Tensor, dim: int) -> str:
    """Advice for a tensor that does not have ``dim`` dimensions."""
    if dim == 2 and value.dim() == 1 and not value.is_floating_point():
        return "; these look like class indices: check the order of the arguments"
    if dim < 2:
        return f"; pass {name}.flatten()" if dim else f"; pass {name}.reshape(()) for one number"
    if name == "logits":
        return _for_logits_shape(value)
    if name == "input" and value.dim() == 1:
        return "; for one sample pass input.unsqueeze(0)"
    if name == "input" and dim == 2 and value.dim() > 2:
        return (
            "; pass input.flatten(1) if the first dimension counts the samples, or "
            "input.flatten(0, -2) if only the last one counts features"
        )
    if name == "weight" and value.dim() == 1:
        return "; for a layer with one output pass torch.stack([-weight / 2, weight / 2])"
    if name == "weight" and value.dim() > 2:
        return "; for a convolution that sees one position pass weight.flatten(1)"
    return ""


def _for_logits_shape(logits: Tensor) -> str:
    if logits.dim() == 1:
        return f"; for binary logits z pass {_BINARY}; for one sample pass logits.unsqueeze(0)"
    if logits.dim() > 2:
        return (
            "; pass logits.flatten(0, -2), or logits.movedim(1, -1).flatten(0, -2) if dimension 1 "
            "counts the classes, and target.flatten()"
        )
    return ""


def for_one_column(logits: Tensor) -> str:
    """Advice for logits with fewer than two columns."""
    return f"; for binary logits pass {_BINARY}; z = logits.squeeze(-1)" if logits.shape[-1] else ""


def for_one_row(weight: Tensor) -> str:
    """Advice for a weight with fewer than two rows."""
    if not weight.shape[0]:
        return ""
    return (
        "; for a layer with one output pass torch.cat([-weight / 2, weight / 2]), and its bias in "
        "the same way"
    )


def for_dtype(name: str, value: Tensor) -> str:
    """Advice for a tensor that is not floating-point."""
    if value.is_complex():
        return f"; pass {name}.real if the imaginary parts are 0"
    return f"; pass {name}.dequantize()" if value.is_quantized else f"; pass {name}.float()"


def for_target(name: str, target: Tensor, rows: Any) -> str:
    """Advice for targets of a wrong dtype or shape. Reads no value."""
    if target.is_complex():
        return ""
    convert = "" if target.dtype == torch.int64 else ".long()"
    if target.dim() == 2 and target.shape[1] == 1:
        return f"; pass {name}.squeeze(1){convert}"
    if target.dim() == 2 and target.shape[0] == rows:
        numbers = ".long()" if target.dtype == torch.bool else ""
        return f"; if its rows are one-hot, pass {name}{numbers}.argmax(1)"
    if target.dim() == 0:
        return f"; for one sample pass {name}.unsqueeze(0){convert}"
    if target.dim() > 1:
        return f"; pass {name}.flatten(){convert}, with one row of the other tensor for each target"
    if convert and target.is_floating_point():
        return f"; if these are class indices, pass {name}.long()"
    return f"; pass {name}{convert}" if convert else ""


def for_target_of_rows(name: str, target: Tensor, like_name: str, shape: torch.Size) -> str:
    """Advice for targets of a wrong dtype or shape, one for each row of a tensor [..., N, C]."""
    if target.is_complex():
        return ""
    rows, convert = shape[:-1], "" if target.dtype == torch.int64 else ".long()"
    if target.shape == rows:
        condition = "if these are class indices, " if target.is_floating_point() else ""
        return f"; {condition}pass {name}{convert}"
    if like_name == "logits" and target.shape == (*shape[:1], *shape[2:]):
        return "; if dimension 1 of logits counts the classes, pass logits.movedim(1, -1)"
    if target.numel() == rows.numel():
        return f"; pass {name}.reshape({', '.join(map(str, rows))}){convert}"
    if target.shape[:-1] == rows:
        numbers = ".long()" if target.dtype == torch.bool else ""
        return f"; if its last dimension is one-hot, pass {name}{numbers}.argmax(-1)"
    return ""


def for_transposed(name: str, value: Tensor, rows: Any, columns: Any) -> str:
    """Advice for a matrix of a wrong shape. None stands for any number."""
    fits = rows in (None, value.shape[1]) and columns in (None, value.shape[0])
    return f"; pass {name}.t()" if fits else ""


def for_width(weight: Tensor, columns: Any) -> str:
    """Advice for a weight and features of different widths."""
    todo = for_transposed("weight", weight, None, columns)
    return todo or "; pass the features that enter the layer of this weight"


def for_int(name: str, value: Any) -> str:
    """Advice for an object that is no int."""
    if value is None and name == "ignore_index":
        return "; leave it out to ignore no sample"
    if isinstance(value, (bool, str)) or not hasattr(value, "__int__"):
        return ""
    return f"; pass int({name})"


def for_float(name: str, value: Any) -> str:
    """Advice for an object that is no float."""
    return f"; pass float({name})" if hasattr(value, "__float__") else ""


def for_k(k: Any) -> str:
    """Advice for a number of samples that is no int."""
    if isinstance(k, float) and 0 < k < 1:
        return f"; pass k = int({k} * N), where N is the number of samples"
    return for_int("k", k)


def problem_of_inputs(inputs: Any) -> str | None:
    """What is wrong with the inputs of a network that can be made tensors, as arrays can."""
    if inputs is None or isinstance(inputs, (str, int, float)):
        return f"expected a batch of tensors, got {type(inputs).__name__}"
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], (tuple, list)):
        todo = "pass torch.as_tensor(inputs)"
        if any(isinstance(item, Tensor) for item in inputs[0]):
            todo = "for a list of samples (x, y) pass torch.stack([x for x, _ in inputs])"
        return f"expected one batch, got a list of {type(inputs[0]).__name__}; {todo}"
    if isinstance(inputs, Mapping):
        parts = {f"inputs[{key!r}]": value for key, value in inputs.items()}
    elif isinstance(inputs, (tuple, list)):
        parts = {f"inputs[{index}]": value for index, value in enumerate(inputs)}
    else:
        parts = {"inputs": inputs}
    for name, value in parts.items():
        todo = "" if isinstance(value, (Tensor, tuple, list)) else for_object(name, value)
        if todo:
            return f"expected a batch of tensors, got {type(value).__name__} as {name}{todo}"
    return None


def problem_of_arguments(
    forward: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
    error: Exception,
) -> str | None:
    """Why a function that raised ``error`` cannot take these arguments; None if it can."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as mismatch:
        reason = str(mismatch)
    else:
        if not (isinstance(error, TypeError) and _is_labelled_batch(arguments)):
            return None
        reason = str(error)
    expected = f"expected the arguments of network.forward({', '.join(signature.parameters)})"
    if keywords:
        extra = [repr(name) for name in keywords if name not in signature.parameters]
        todo = f"leave out {', '.join(extra)}" if extra else "add what is missing"
        return f"{expected}, got the keys {[*keywords]} ({reason}); {todo}"
    shapes = {getattr(argument, "shape", None) for argument in arguments}
    if len(arguments) > 1 and len(shapes) == 1 and None not in shapes:
        todo = "pass torch.stack(inputs) if they are samples"
    elif len(arguments) < 2:
        todo = "pass a tuple of all arguments"
    else:
        todo = "pass x alone if they are a batch (x, y), because inputs hold no targets"
    return f"{expected}, got {len(arguments)} positional arguments ({reason}); {todo}"


def _is_labelled_batch(arguments: tuple[Any, ...]) -> bool:
    """Whether these are a batch ``(x, y)``: as many integers as there are rows."""
    if len(arguments) != 2 or not all(isinstance(value, Tensor) for value in arguments):
        return False
    x, y = arguments
    return y.dim() == 1 and not y.is_floating_point() and x.shape[:1] == y.shape


def for_output(output: Any) -> str:
    """Advice for the output of a network that holds no logits ``[B, C]``."""
    if isinstance(output, Mapping):
        return (
            f"; return the logits from forward under the key 'logits', not only {[*output]}, or "
            "name their key with output= if the function takes it"
        )
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if isinstance(first, Tensor) and first.dim() == 0:
        return "; leave the labels out of inputs if this is a loss"
    if isinstance(output, (tuple, list)):
        return (
            "; return one of these from forward, for example the first element, or name its "
            "position with output= if the function takes it"
        )
    if isinstance(output, Tensor) and output.dim() == 1:
        return (
            "; add a batch dimension to inputs, for example with x.unsqueeze(0), or return one "
            "column for each class"
        )
    if isinstance(output, Tensor):
        return "; return one row for each sample and one column for each class"
    return "; return one of these from forward"
