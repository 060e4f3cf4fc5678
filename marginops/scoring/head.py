"""Finds and checks the last layer: its weight and bias, in a file or from a function."""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import FLOATING, result_dtype
from .._functions import find_function
from ..networks import unwrap
from .errors import DataError

# What a user may name: a file, a function, or the text MODULE:FUNCTION.
Source = str | os.PathLike[str] | Callable[[], Any]
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_MOST_NAMES = 20
_NO_LAYER = "pass layer=, the name of one"


@dataclass(frozen=True)
class Head:
    """The last layer of a network, ``logits = features @ weight.T + bias``.

    Attributes:
        weight: ``[C, D]``, float32 or float64, finite.
        bias: ``[C]`` in the dtype of ``weight``, or None.
        place: Where it comes from, for errors.
    """

    weight: Tensor
    bias: Tensor | None
    place: str

    def sha256(self) -> str:
        """A hash of the shape, the dtype and all values."""
        return hash_tensors({"weight": self.weight, "bias": self.bias})


def checked_source(name: str, source: Any, allow_file: bool = True) -> Source:
    """Check the argument ``name`` and make the path of a file absolute.

    Raises:
        TypeError: It is neither a path nor a function that another process can import.
        ValueError: It is text of another form than MODULE:FUNCTION, and no file is allowed.
    """
    expected = "a function without arguments or MODULE:FUNCTION"
    if allow_file:
        expected = f"the path of a file, {expected}"
    if isinstance(source, str) and _is_place(source):
        return source
    if isinstance(source, str | os.PathLike):
        if not allow_file:
            raise ValueError(f"{name}: expected {expected}, got {os.fspath(source)!r}")
        return os.path.abspath(source)
    if isinstance(source, nn.Module | Tensor | tuple) or not callable(source):
        raise TypeError(
            f"{name}: expected {expected}, got {type(source).__name__}; write a function that "
            "returns it, so that each process makes its own"
        )
    if "<" in getattr(source, "__qualname__", ""):  # <lambda> or <locals>
        raise TypeError(
            f"{name}: expected a function that other processes can import, got "
            f"{source.__qualname__}; define it with def at the top of a module"
        )
    return source


def _is_place(text: str) -> bool:
    return bool(_FUNCTION.fullmatch(text)) and not os.path.exists(text)


def place_of(source: Source) -> str:
    """The name of a file or function, as MODULE:FUNCTION, for errors and descriptions."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    kind = source if hasattr(source, "__qualname__") else type(source)
    return f"{kind.__module__}:{kind.__qualname__}"


def call_source(name: str, source: Source) -> Any:
    """Call the function. What it raises passes as it is.

    Raises:
        TypeError: The function needs arguments.
        ValueError: There is no such function.
    """
    function = find_function(name, source) if isinstance(source, str) else source
    assert callable(function)
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C may not tell its arguments
        return function()
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{name}: expected a function without arguments, got {place_of(source)}{signature}"
        ) from error
    return function()


def load_head(source: Source, layer: str | None) -> Head:
    """Read the head from a file, or from what a function returns.

    Raises:
        DataError: The file holds no such layer, or its values are no weight and bias of a layer.
        TypeError, ValueError: The function does not exist or returns something else.
    """
    place = place_of(source)
    is_file = isinstance(source, os.PathLike) or (isinstance(source, str) and not _is_place(source))
    if is_file:
        weight, bias = _from_file(place, layer)
    else:
        weight, bias = _from_object(call_source("head", source), place, layer)
    return _checked(weight, bias, place)


def _from_object(value: Any, place: str, layer: str | None) -> tuple[Any, Any]:
    if isinstance(value, tuple) and len(value) == 2 and layer is None:
        return value
    if not isinstance(value, nn.Module):
        raise TypeError(
            f"head: expected {place} to return a torch.nn.Module or (weight, bias), got "
            f"{type(value).__name__}"
        )
    module = unwrap(value)
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    if layer is not None and layer in linears:
        found = linears[layer]
    elif layer is None and len(linears) == 1:
        (found,) = linears.values()
    else:
        wanted = "one torch.nn.Linear" if layer is None else f"a torch.nn.Linear {layer!r}"
        raise ValueError(
            f"head: expected {wanted} in what {place} returns, got {_listed(linears)}; {_NO_LAYER}"
        )
    return found.weight, found.bias


def _from_file(path: str, layer: str | None) -> tuple[Any, Any]:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise DataError(f"head: expected a file that can be read, got {path} ({error})") from error
    # A safetensors file starts with the length of its header, eight bytes, and the header, JSON.
    if start[8:] == b"{":
        return _from_safetensors(path, layer)
    tensors = _flat(_load(path), "")
    weight, bias = _find(tensors, path, layer)
    return tensors[weight], tensors.get(bias)


def _from_safetensors(path: str, layer: str | None) -> tuple[Any, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            weight, bias = _find(meta, path, layer)
            return file.get_tensor(weight), file.get_tensor(bias) if bias in shapes else None
    except SafetensorError as error:
        raise DataError(f"head: expected a whole safetensors file, got {path} ({error})") from error


def _load(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        expected, todo = "a whole file of safetensors or torch.save", ""
        if isinstance(error, pickle.UnpicklingError):
            expected = "a file of tensors, which torch.load reads with weights_only=True"
            todo = "; save model.state_dict() and not the model"
            # The first line of this error is advice with escape codes of a terminal.
            found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
            reason = f"it holds a {found[1]}" if found else "no reason is known"
        raise DataError(f"head: expected {expected}, got {path} ({reason}){todo}") from error


def _flat(value: Any, prefix: str) -> dict[str, Tensor]:
    """All tensors in nested mappings, under names with dots."""
    if isinstance(value, Tensor):
        return {prefix or "weight": value}
    if not isinstance(value, Mapping):
        return {}
    flat: dict[str, Tensor] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _find(tensors: Mapping[str, Tensor], path: str, layer: str | None) -> tuple[str, str]:
    """The names of weight and bias of the layer."""
    layers = {
        name.removesuffix("weight").removesuffix("."): tensor
        for name, tensor in tensors.items()
        if (name == "weight" or name.endswith(".weight")) and tensor.dim() == 2
    }
    if layer is None and len(layers) == 1:
        (layer,) = layers
    if layer is None or layer not in layers:
        wanted = "one layer with a matrix" if layer is None else f"a layer {layer!r}"
        raise DataError(
            f"head: expected {wanted} named NAME.weight in {path}, got {_listed(layers)}"
            + (f"; {_NO_LAYER}" if layers else "")
        )
    prefix = f"{layer}." if layer else ""
    weight, bias = f"{prefix}weight", f"{prefix}bias"
    others = [
        name
        for name in tensors
        if name.startswith(prefix)
        and name not in (weight, bias)
        and (layer or "." not in name)  # other layers are not parts of a layer without a name
    ]
    if others:
        raise DataError(
            f"head: expected weight and bias alone in the layer {layer!r} of {path}, got also "
            f"{', '.join(others[:_MOST_NAMES])}; merge an adapter or a scale into the weight"
        )
    return weight, bias


def _listed(layers: Mapping[str, Any]) -> str:
    """The names of layers with the shapes of their weights."""
    texts = [
        f"{name!r} {list(getattr(layer, 'weight', layer).shape)}" for name, layer in layers.items()
    ]
    more = len(texts) - _MOST_NAMES
    if more > 0:
        texts[_MOST_NAMES:] = [f"and {more} more"]
    return ", ".join(texts) or "none"


def _checked(weight: Any, bias: Any, place: str) -> Head:
    """The head in float32 or float64, with finite values."""
    given = {"weight [C >= 2, D >= 1]": weight}
    if bias is not None:
        given["bias [C]"] = bias
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"head: expected a tensor {name}, got {type(value).__name__} ({place})")
        if value.dtype not in FLOATING or value.is_meta or value.layout != torch.strided:
            kind = "a meta tensor" if value.is_meta else f"{value.layout} {value.dtype}"
            raise DataError(
                f"head: expected a floating-point tensor {name} with values, got {kind} ({place})"
            )
    rows = weight.shape[0] if weight.dim() == 2 else 0
    if rows < 2 or not weight.numel():
        raise DataError(
            f"head: expected weight [C >= 2, D >= 1], got {list(weight.shape)} ({place})"
        )
    if bias is not None and bias.shape != (rows,):
        raise DataError(
            f"head: expected bias [{rows}] for weight {list(weight.shape)}, got "
            f"{list(bias.shape)} ({place})"
        )
    dtype = result_dtype(weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, result_dtype(bias.dtype))
    for name, value in given.items():
        if not value.detach().to(dtype).isfinite().all():
            raise DataError(f"head: expected finite values in {name}, got NaN or inf ({place})")
    # Copies, because the bits of a product depend on where the memory of its arguments begins.
    weight, bias = (
        None
        if value is None
        else torch.empty(value.shape, dtype=dtype, device="cpu").copy_(value.detach())
        for value in (weight, bias)
    )
    return Head(weight, bias, place)


def hash_tensors(tensors: Mapping[str, Tensor | None]) -> str:
    """The sha256 of named tensors: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor is None:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()
