"""Columns as tensors: the right rows at every offset, in the memory of the data."""

from __future__ import annotations

import re
import warnings
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given

from helpers.scored_heads import fixed_lists
from marginops.scoring import DataError
from marginops.scoring.columns import column, read_inputs, read_matrix
from marginops.scoring.labels import read_ids, read_target

VALUES = np.arange(24, dtype=np.float32).reshape(6, 4)
FLOATS = {
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bfloat16": pa.uint16(),
}
ARROW_FORMS = ("fixed", "list", "large", "tensor", "bytes")


def as_arrow(values: torch.Tensor, form: str) -> pa.Array:
    """The rows of a tensor in a form of Arrow."""
    width = values.shape[1]
    flat = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    lists = pa.FixedSizeListArray.from_arrays(pa.array(flat.numpy().reshape(-1)), width)
    if form == "fixed":
        return lists
    if form == "tensor":
        kind = pa.fixed_shape_tensor(lists.type.value_type, [1, width])
        return pa.ExtensionArray.from_storage(kind, lists)
    if form == "bytes":
        size = values.element_size() * width
        return pa.array([row.tobytes() for row in flat.numpy()], pa.binary(size))
    make = pa.list_ if form == "list" else pa.large_list
    return lists.cast(make(lists.type.value_type))


@pytest.mark.parametrize("form", ARROW_FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_slices_are_read_without_a_copy(form: str, dtype: str) -> None:
    values = torch.arange(28.0).view(7, 4).to(getattr(torch, dtype))
    array = as_arrow(values, form)
    whole = read_matrix(array, "x", dtype, None)
    assert whole.missing is None
    assert whole.values.dtype == values.dtype
    assert torch.equal(whole.values, values)
    part = read_matrix(array.slice(1).slice(2, 3), "x", dtype, None).values
    assert torch.equal(part, values[3:6])
    assert part.data_ptr() == whole.values[3].data_ptr()
    assert read_matrix(array.slice(7), "x", dtype, 4).values.shape[0] == 0


@pytest.mark.parametrize("form", ["fixed", "list", "large"])
@given(data=st.data())
def test_nulls_of_rows_and_of_values(form: str, data: st.DataObject) -> None:
    value = st.one_of(st.none(), st.integers(-9, 9).map(float))
    row = st.one_of(st.none(), st.lists(value, min_size=3, max_size=3))
    rows = data.draw(st.lists(row, max_size=20))
    kinds = {"fixed": pa.list_(pa.float32(), 3), "list": pa.list_(pa.float32())}
    array = pa.array(rows, kinds.get(form, pa.large_list(pa.float32())))
    start = data.draw(st.integers(0, len(rows)))
    length = data.draw(st.integers(0, len(rows) - start))
    matrix = read_matrix(array.slice(start, length), "x", None, 3)
    part = rows[start : start + length]
    missing = [row is None or None in row for row in part]
    assert (matrix.missing is not None and matrix.missing.any()) == any(missing)
    assert matrix.values.shape == (length, 3)
    for index, wanted in enumerate(part):
        if missing[index]:
            assert matrix.missing is not None
            assert matrix.missing[index]
        else:
            assert matrix.values[index].tolist() == wanted
            assert matrix.missing is None or not matrix.missing[index]


def test_null_bytes_are_missing() -> None:
    rows = [VALUES[0].tobytes(), None, VALUES[2].tobytes()]
    matrix = read_matrix(pa.array(rows, pa.binary(16)).slice(1), "x", "float32", None)
    assert matrix.missing is not None
    assert matrix.missing.tolist() == [True, False]
    np.testing.assert_array_equal(matrix.values[1], VALUES[2])


def test_arrays_are_read_in_their_memory_without_a_warning() -> None:
    frozen = VALUES.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in (VALUES, frozen, VALUES[2:], frozen[1:5], VALUES[:, ::2]):
            got = read_matrix(values, "x", None, None).values
            np.testing.assert_array_equal(got, values)
            assert got.data_ptr() == values.ctypes.data
        for values in (VALUES[::-1], frozen[:, ::-1], VALUES.astype(">f4")):
            np.testing.assert_array_equal(read_matrix(values, "x", None, None).values, values)
    bits = torch.tensor([[1.0, -2.5]], dtype=torch.bfloat16)
    assert read_matrix(bits.view(torch.uint16).numpy(), "x", None, None).values.equal(bits)
    assert read_matrix(bits, "x", "bfloat16", None).values.equal(bits)


def test_rows_of_other_lengths() -> None:
    rows: list[Any] = [[1.0, 2.0], None, [3.0], [4.0, 5.0]]
    message = "column: expected rows of 2 values in 'x', got 1 in row 2 of the batch"
    for kind in (pa.list_(pa.float32()), pa.large_list(pa.float16())):
        with pytest.raises(DataError, match=message):
            read_matrix(pa.array(rows, kind), "x", None, None)
        with pytest.raises(DataError, match="got 1 in row 1 of the batch"):
            read_matrix(pa.array(rows, kind).slice(1), "x", None, 2)
    arrays = [None if row is None else np.array(row) for row in rows]
    objects = np.empty(4, dtype=object)
    objects[:] = arrays
    for form in (arrays, objects):
        with pytest.raises(DataError, match=message):
            read_matrix(form, "x", None, None)


def test_rows_of_objects() -> None:
    objects = np.empty(4, dtype=object)
    objects[:] = [np.array([1, 2], np.float16), None, [3.0, 4.0], np.array([5.0, None])]
    for form in (objects, [*objects], tuple(objects)):
        matrix = read_matrix(form, "x", None, None)
        assert matrix.missing is not None
        assert matrix.missing.tolist() == [False, True, False, True]
        assert matrix.values[::2].tolist() == [[1, 2], [3, 4]]
    square = np.array([[1.0, 2.0], [None, 3.0]], dtype=object)
    matrix = read_matrix(square, "x", None, None)
    assert matrix.missing is not None
    assert matrix.missing.tolist() == [False, True]
    for nothing in ([None, None], objects[1:2], []):
        matrix = read_matrix(nothing, "x", None, 3)
        assert matrix.values.shape == (len(nothing), 3)
        assert matrix.values.dtype == torch.float32


@pytest.mark.parametrize(
    "values",
    [
        [[1.0], "a"],
        [torch.ones(2), torch.ones(3)],
        [torch.ones(2), [1.0, 2.0]],
        [np.ones((2, 2))],
        np.array([[1.0, "a"]], dtype=object),
    ],
)
def test_rows_of_several_forms(values: Any) -> None:
    with pytest.raises(
        DataError, match=re.escape("column: expected rows of one form in 'x', got ")
    ):
        read_matrix(values, "x", None, None)


@pytest.mark.parametrize("dtype", [np.longdouble, "U1", "S1", "datetime64[s]", "complex64"])
def test_arrays_that_are_no_numbers_of_torch(dtype: Any) -> None:
    for values in (np.zeros((2, 2), dtype), np.zeros((2, 2), dtype)[::-1]):
        with pytest.raises(DataError, match=r"column: expected .* in 'x', got "):
            read_matrix(values, "x", None, None)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array([1.0, 2.0]), "column: expected a fixed_size_list, list, large_list or fixed_sh"),
        (pa.array(["a"]), "of bfloat16) in 'x', got string"),
        (pa.array([[1, 2]]), "of bfloat16) in 'x', got list<item: int64>"),
        (pa.array([b"12345678"]), "of bfloat16) in 'x', got binary"),
        (pa.array([None, None]), "of bfloat16) in 'x', got null"),
    ],
)
def test_types_that_are_no_rows_of_numbers(array: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        read_matrix(array, "x", None, None)


def test_a_column_that_is_there_twice() -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    with pytest.raises(DataError, match="column: expected one column 'x', got 2 of them"):
        column(table, "column", "x")
    with pytest.raises(DataError, match="column: expected one column 'y', got columns x, x"):
        column(table, "column", "y")
    with pytest.raises(DataError, match=r"column: expected one column 'y', got columns \(none\)"):
        column({}, "column", "y")


def test_inputs_of_a_model() -> None:
    numbers, missing = read_inputs(pa.array([1, None, 3], pa.int32()).slice(1), "x")
    assert isinstance(numbers, torch.Tensor)
    assert (numbers.dtype, numbers[1].item()) == (torch.int32, 3)
    assert missing is not None
    assert missing.tolist() == [True, False]
    storage = fixed_lists(VALUES.astype(np.uint8)).slice(2)
    for shape in ([2, 2], [4], [1, 4, 1]):
        kind = pa.fixed_shape_tensor(pa.uint8(), shape)
        tensors, _ = read_inputs(pa.ExtensionArray.from_storage(kind, storage), "x")
        np.testing.assert_array_equal(tensors, VALUES[2:].reshape(4, *shape))
    kind = pa.fixed_shape_tensor(pa.uint8(), [2, 2], permutation=[1, 0])
    with pytest.raises(DataError, match="expected 'x' without a permutation of dimensions"):
        read_inputs(pa.ExtensionArray.from_storage(kind, storage), "x")
    bits, _ = read_inputs(fixed_lists(VALUES.astype(np.uint16)), "x")
    assert isinstance(bits, torch.Tensor)
    assert bits.dtype == torch.uint16
    images = [b"123", None]
    for form in (pa.array(images), images, np.array(images, dtype=object)):
        items, missing = read_inputs(form, "x")
        assert (items, missing.tolist() if missing is not None else None) == (images, [False, True])


def test_labels_at_an_offset() -> None:
    labels = pa.array([5, None, 3, 4], pa.uint8())
    assert read_target(labels.slice(1, 2), "y", -7).tolist() == [-7, 3]
    assert read_target(labels.slice(2), "y", -7).tolist() == [3, 4]
    assert read_target(torch.tensor([1, 2], dtype=torch.int16), "y", -7).tolist() == [1, 2]
    frozen = np.array([1, 2])
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_target(frozen, "y", -7).tolist() == [1, 2]


def test_ids_at_an_offset() -> None:
    ids = pa.array([None, "b", "c"])
    assert read_ids(ids.slice(1), "key").to_pylist() == ["b", "c"]
    with pytest.raises(DataError, match="got null in row 0 of the batch"):
        read_ids(ids, "key")
    assert read_ids(torch.tensor([3, 4]), "key").to_pylist() == [3, 4]
