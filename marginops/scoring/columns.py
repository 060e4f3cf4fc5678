"""Columns of a batch as tensors, without a copy where the memory allows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .errors import DataError

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ARROW_DTYPES = {
    pa.float16(): torch.float16,
    pa.float32(): torch.float32,
    pa.float64(): torch.float64,
    pa.uint16(): torch.bfloat16,  # Arrow has no bfloat16: its bits
}
_FORMS = (
    "a fixed_size_list, list, large_list or fixed_shape_tensor of float16, float32, float64 or "
    "uint16 (the bits of bfloat16)"
)


@dataclass(frozen=True)
class Matrix:
    """The values of a column.

    Attributes:
        values: ``[N, D]``, or ``[N, ...]`` for a model.
        missing: ``[N]`` bool, true for rows that are null or hold a null; None if no row is. The
            values of such rows mean nothing.
    """

    values: Tensor
    missing: Tensor | None


def column(batch: Any, argument: str, name: str) -> Any:
    """A column of a mapping, of a data frame or of a batch of Arrow, there in one piece.

    ``argument`` of the scorer holds the name.
    """
    if isinstance(batch, pa.RecordBatch | pa.Table):
        values = batch.column(column_place(batch.schema, argument, name))
    else:
        try:
            values = batch[name]
        except (KeyError, IndexError, TypeError) as error:
            if not isinstance(batch, Mapping) and not hasattr(batch, "columns"):
                raise TypeError(
                    "batch: expected a mapping of arrays, a data frame, or a RecordBatch or Table "
                    f"of pyarrow, got {type(batch).__name__}"
                ) from error
            raise _no_column(argument, name, [*map(str, batch)]) from error
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    if not isinstance(values, pa.Array | np.ndarray | Tensor | list | tuple):
        values = np.asarray(values)  # a Series
    return values


def column_place(schema: pa.Schema, argument: str, name: str) -> int:
    """The position of a column, which must be there once."""
    places = schema.get_all_field_indices(name)
    if len(places) != 1:
        raise _no_column(argument, name, schema.names)
    return int(places[0])


def _no_column(argument: str, name: str, names: Sequence[str]) -> DataError:
    count = names.count(name)
    got = f"columns {', '.join(names) or '(none)'}; check the name"
    if count:
        got = f"{count} of them; rename the others"
    return DataError(f"{argument}: expected one column {name!r}, got {got}")


def check_type(name: str, kind: pa.DataType, dtype: str | None) -> int | None:
    """Check the type of a column of features or logits.

    Returns:
        The width D of its rows; None if only the rows tell it.
    """
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    width = None
    if pa.types.is_fixed_size_binary(kind):
        if dtype is None:
            raise DataError(
                f"dtype: expected {', '.join(DTYPES)} for {name!r} of type {kind}, got None; say "
                "which numbers the bytes are"
            )
        size = DTYPES[dtype].itemsize
        if kind.byte_width % size:
            raise DataError(
                f"column: expected rows of {dtype}, {size} bytes each, in {name!r}, got {kind}"
            )
        return int(kind.byte_width // size)
    if pa.types.is_fixed_size_list(kind):
        width = kind.list_size
    elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise DataError(f"column: expected {_FORMS} in {name!r}, got {kind}")
    if kind.value_type not in _ARROW_DTYPES:
        raise DataError(f"column: expected {_FORMS} in {name!r}, got {kind}")
    if dtype is not None and DTYPES[dtype] != _ARROW_DTYPES[kind.value_type]:
        raise DataError(f"column: expected values of {dtype} in {name!r}, got {kind}")
    return width


def read_matrix(values: Any, name: str, dtype: str | None, width: int | None) -> Matrix:
    """The features or logits of a column, ``[N, D]``.

    ``width`` is the D of missing rows where no row tells it. Rows of one other width are no error.
    """
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = [*values]
    if isinstance(values, list | tuple):
        values = _from_list(values, name)
    if isinstance(values, pa.Array):
        check_type(name, values.type, dtype)
        matrix = _matrix(values, name, width)
        wanted = DTYPES[dtype] if dtype is not None else _ARROW_DTYPES[_value_type(values.type)]
        tensor = matrix.values
        if tensor.dtype != wanted:
            tensor = tensor.view(wanted)  # from bytes, or the bits of bfloat16
        return Matrix(tensor, matrix.missing)
    if isinstance(values, np.ndarray):
        values = as_tensor(values, name)
    if values.dtype == torch.uint16:
        values = values.view(torch.bfloat16)
    if values.dim() != 2 or values.dtype not in DTYPES.values():
        raise DataError(
            f"column: expected [N, D] of float16, bfloat16, float32 or float64 in {name!r}, got "
            f"{list(values.shape)} of {values.dtype}"
        )
    if dtype is not None and values.dtype != DTYPES[dtype]:
        raise DataError(f"column: expected values of {dtype} in {name!r}, got {values.dtype}")
    return Matrix(values.detach(), None)


def read_inputs(values: Any, name: str) -> tuple[Tensor | list[Any], Tensor | None]:
    """The inputs of a model: a tensor for numbers, else a list; and which rows are missing."""
    if isinstance(values, pa.Array):
        shape: list[int] | None = None
        if isinstance(values.type, pa.FixedShapeTensorType):
            if values.type.permutation not in (None, [*range(len(values.type.shape))]):
                raise DataError(f"column: expected {name!r} without a permutation of dimensions")
            shape, values = list(values.type.shape), values.storage
        if _is_number(_value_type(values.type)):
            is_flat = _is_number(values.type)
            matrix = _flat_values(values) if is_flat else _matrix(values, name, None)
            tensor = matrix.values if shape is None else matrix.values.unflatten(1, shape)
            return tensor, matrix.missing
        missing = _booleans(values.is_null()) if values.null_count else None
        return values.to_pylist(), missing
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
        return as_tensor(values, name), None
    if isinstance(values, Tensor):
        return values, None
    items = list(values)
    missing = torch.tensor([item is None for item in items], dtype=torch.bool, device="cpu")
    return items, missing if missing.any() else None


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _value_type(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.FixedShapeTensorType):
        kind = kind.storage_type
    return getattr(kind, "value_type", kind)


def _matrix(values: pa.Array, name: str, width: int | None) -> Matrix:
    """The rows of an array of lists, or of bytes as uint8."""
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_fixed_size_binary(values.type):
        return _bytes(values)
    if pa.types.is_fixed_size_list(values.type):
        size = values.type.list_size
        inner = values.values.slice(values.offset * size, len(values) * size)
        flat = _flat_values(inner)
        missing = flat.missing
        rows = len(values), size
        if missing is not None:
            missing = missing.view(rows).any(1)
        if values.null_count:
            nulls = _booleans(values.is_null())
            missing = nulls if missing is None else missing | nulls
        return Matrix(flat.values.view(rows), missing)
    return _lists(values, name, width)


def _lists(values: pa.Array, name: str, width: int | None) -> Matrix:
    """The rows of lists of any length. All must have the same length."""
    lengths = pc.list_value_length(values)
    present = lengths.drop_null() if lengths.null_count else lengths
    first = present[0].as_py() if len(present) else width or 0
    least, most = (first, first)
    if len(present):
        least, most = (bound.as_py() for bound in pc.min_max(present).values())
    width = first if width is None or least == most else width
    if least != most:
        wrong = pc.index(pc.fill_null(pc.not_equal(lengths, width), False), True).as_py()
        raise DataError(
            f"column: expected rows of {width} values in {name!r}, got {lengths[wrong]} in row "
            f"{wrong} of the batch; write rows of one length, or null"
        )
    flat = _flat_values(values.flatten())
    inner = flat.values.view(len(present), width)
    missing = None if flat.missing is None else flat.missing.view(len(present), width).any(1)
    if not values.null_count:
        return Matrix(inner, missing)
    nulls = _booleans(values.is_null())
    rows = inner.new_zeros(len(values), width)
    rows[~nulls] = inner
    if missing is not None:
        nulls[~nulls] = missing
    return Matrix(rows, nulls)


def _bytes(values: pa.Array) -> Matrix:
    width = values.type.byte_width
    start, size = values.offset * width, len(values) * width
    data = values.buffers()[1].slice(start, size) if size else pa.py_buffer(b"")
    flat = pa.Array.from_buffers(pa.uint8(), size, [None, data])
    missing = _booleans(values.is_null()) if values.null_count else None
    return Matrix(from_dlpack(flat).view(len(values), width), missing)


def _flat_values(values: pa.Array) -> Matrix:
    """A flat array of numbers, and which are null."""
    missing = _booleans(values.is_null()) if values.null_count else None
    if missing is not None:  # DLPack knows no nulls
        buffers = [None, values.buffers()[1]]
        values = pa.Array.from_buffers(values.type, len(values), buffers, offset=values.offset)
    return Matrix(from_dlpack(values), missing)


def _booleans(values: pa.Array) -> Tensor:
    return torch.from_numpy(np.array(values.to_numpy(zero_copy_only=False), dtype=bool))


def as_tensor(values: np.ndarray[Any, Any], name: str) -> Tensor:
    """A tensor in the memory of an array, also of one that cannot be written."""
    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.name == "bfloat16":  # of ml_dtypes
        return as_tensor(values.view(np.uint16), name).view(torch.bfloat16)
    try:
        if values.flags.writeable and all(stride >= 0 for stride in values.strides):
            return torch.from_numpy(values)
        # torch.from_numpy warns of memory that cannot be written. pyarrow takes it as it is.
        flat = np.ascontiguousarray(values).reshape(-1)
        return from_dlpack(pa.array(flat)).view(values.shape)
    except (TypeError, pa.ArrowException) as error:
        raise DataError(f"column: expected numbers in {name!r}, got {values.dtype}") from error


def _from_list(values: Sequence[Any], name: str) -> Tensor | pa.Array:
    """The rows of a list or of an array of objects, in which None is a missing row."""
    try:
        if values and all(isinstance(row, Tensor) for row in values):
            return torch.stack([*values])
        is_known = any(row is not None for row in values)
        return pa.array(values, None if is_known else pa.list_(pa.float32()))
    except (RuntimeError, pa.ArrowException) as error:
        raise DataError(f"column: expected rows of one form in {name!r}, got {error}") from error
