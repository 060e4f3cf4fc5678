"""Columns of labels and of ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .errors import DataError


def check_target_type(name: str, kind: Any) -> None:
    """Check the type of a column of labels."""
    if not pa.types.is_integer(_decoded(kind)):
        raise DataError(
            f"target: expected a column of integers (classes), got {kind} in {name!r}; write the "
            "labels as integers"
        )


def read_target(values: Any, name: str, ignore_index: int) -> Tensor:
    """The labels of a column, ``[N]`` int64; null becomes ``ignore_index``."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, pa.Array):
        values = _one_dimension(values, "target", name)
    check_target_type(name, values.type)
    try:
        values = values.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"target: expected classes in int64 in {name!r}, got {error}") from error
    if values.null_count:
        values = values.fill_null(ignore_index)
    return from_dlpack(values)


def check_classes(
    target: Tensor, unlabelled: Tensor, name: str, num_classes: int, ignore_index: int
) -> None:
    """Check that the labels of labelled rows are classes."""
    if not len(target):
        return
    least, most = torch.aminmax(target)
    if least >= 0 and most < num_classes:
        return
    wrong = ((target < 0) | (target >= num_classes)) & ~unlabelled
    if wrong.any():
        row = int(wrong.int().argmax())
        raise DataError(
            f"target: expected classes in [0, {num_classes}), null or ignore_index {ignore_index} "
            f"in {name!r}, got {int(target[row])} in row {row} of the batch; count classes from 0 "
            "on"
        )


def check_id_type(name: str, kind: Any) -> None:
    """Check the type of a column of ids."""
    types, plain = pa.types, _decoded(kind)
    if not (types.is_integer(plain) or types.is_string(plain) or types.is_large_string(plain)):
        raise DataError(f"id: expected a column of integers or strings, got {kind} in {name!r}")


def _decoded(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, also of one with a dictionary."""
    return kind.value_type if isinstance(kind, pa.DictionaryType) else kind


def read_ids(values: Any, name: str) -> pa.Array:
    """The ids of a column: integers of any type, or strings."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, pa.Array):
        values = _one_dimension(values, "id", name)
    check_id_type(name, values.type)
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py()
        raise DataError(
            f"id: expected an id in every row of {name!r}, got null in row {row} of the batch"
        )
    return values


def _one_dimension(values: Any, argument: str, name: str) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise DataError(
            f"{argument}: expected one value a row in {name!r}, got shape {list(values.shape)}"
        )
    try:
        return pa.array(values)
    except pa.ArrowException as error:
        raise DataError(
            f"{argument}: expected values of one type in {name!r}, got {error}"
        ) from error
