"""Batches of any structure: their size, some of their rows, and their device."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .. import _checks as checks


def batch_size(batch: Any) -> int:
    """The number of samples in a batch of any structure.

    A batch is a tensor, or tuples, lists, named tuples, mappings and dataclasses of batches, nested
    in any way. The following parts have one row for each sample:

    * a tensor or a NumPy array that is not a scalar: its first dimension counts the samples;
    * a list or a tuple without tensors and arrays, such as a list of texts: its length counts the
      samples.

    Everything else has no rows and belongs to the whole batch: a scalar tensor, a number, a text,
    None, any other object. Lists of lists without a tensor are refused, because either the outer
    or the inner ones may count the samples.

    Args:
        batch: The batch.

    Returns:
        The number of samples, on which all parts with rows agree.

    Raises:
        TypeError: A part is a list of lists without a tensor, a nested or compressed sparse tensor
            or a :class:`torch.nn.utils.rnn.PackedSequence`, or a mapping cannot be made from a
            dict.
        ValueError: No part has rows, or the parts disagree.

    Example:
        >>> import torch
        >>> from marginops.training import batch_size
        >>> batch_size({"text": ["a", "b", "c"], "image": torch.zeros(3, 8, 8), "scale": 0.5})
        3
    """
    sizes: list[int] = []

    def note(part: Any) -> Any:
        sizes.append(len(part))
        return part

    _map_rows(note, batch)
    if not sizes:
        raise ValueError(
            f"batch: expected a tensor, array or list with one row for each sample, got "
            f"{type(batch).__name__} without any"
        )
    if len(set(sizes)) > 1:
        raise ValueError(
            f"batch: expected one number of samples in all tensors and lists, got {sizes}; take "
            "out what does not have one row for each sample"
        )
    return sizes[0]


def take(batch: Any, indices: Tensor | Sequence[int]) -> Any:
    """Some samples of a batch of any structure.

    Args:
        batch: A batch of B samples, see :func:`batch_size`, which says what has rows.
        indices: ``[k]`` int64 or int32 on any device, or a list of ints, in [0, B), in any order;
            an index may come several times.

    Returns:
        A batch of the same structure. Tensors, arrays, lists and tuples hold the k rows, in the
        order of ``indices``. Other parts are the same objects as in ``batch``. A mapping of a type
        of its own, such as ``BatchEncoding`` of Transformers, is made anew from a dict. A
        dataclass is copied without a call of ``__init__``.

    Raises:
        TypeError, ValueError: ``batch`` is refused by :func:`batch_size`, or ``indices`` have the
            wrong type, shape or range. On CUDA a wrong range is a device-side assertion.

    Tensors are differentiable. Rows of lists and arrays need the values of ``indices``, so the
    function waits for the device if the batch has such parts. Otherwise it does not wait.

    Example:
        >>> import torch
        >>> from marginops.training import take
        >>> take({"text": ["a", "b", "c"], "image": torch.eye(3), "scale": 0.5}, [2, 0])
        {'text': ['c', 'a'], 'image': tensor([[0., 0., 1.],
                [1., 0., 0.]]), 'scale': 0.5}
    """
    rows = _checked_indices(indices, batch_size(batch))
    moved: dict[torch.device, Tensor] = {rows.device: rows}
    values: list[int] | None = None

    def select(part: Any) -> Any:
        nonlocal values
        if isinstance(part, Tensor):
            if part.device not in moved:
                moved[part.device] = rows.to(part.device)
            return part.index_select(0, moved[part.device])
        values = rows.tolist() if values is None else values
        if isinstance(part, np.ndarray):
            return part[values]
        return type(part)(part[row] for row in values)

    return _map_rows(select, batch)


def to_device(batch: Any, device: torch.device | str | int, *, non_blocking: bool = False) -> Any:
    """A batch of any structure with its tensors on another device.

    Args:
        batch: The batch, see :func:`batch_size`. Its parts need not agree in their size.
        device: The device.
        non_blocking: Passed on to :meth:`torch.Tensor.to`.

    Returns:
        A batch of the same structure. Everything but tensors is the same object as in ``batch``.

    Example:
        >>> import torch
        >>> from marginops.training import to_device
        >>> to_device((torch.zeros(2), "name"), "meta")
        (tensor(..., device='meta', size=(2,)), 'name')
    """

    def move(part: Any) -> Any:
        return part.to(device, non_blocking=non_blocking) if isinstance(part, Tensor) else part

    return _map(move, batch)


def _map_rows(function: Callable[[Any], Any], batch: Any) -> Any:
    """Replace the parts that have one row for each sample."""

    def replace(part: Any) -> Any:
        if isinstance(part, (Tensor, np.ndarray)):
            if isinstance(part, Tensor):
                _check_layout(part)
            return function(part) if part.ndim else part
        return function(part) if type(part) in (list, tuple) else part

    return _map(replace, batch, _is_row_list)


def _check_layout(part: Tensor) -> None:
    """Check that rows of a tensor can be taken."""
    if part.is_nested:
        raise TypeError(
            "batch: expected dense tensors, got a nested tensor; pass .to_padded_tensor(0)"
        )
    if part.layout not in (torch.strided, torch.sparse_coo):
        raise TypeError(
            f"batch: expected dense or COO tensors, got layout {part.layout}; pass "
            ".to_sparse_coo() or .to_dense()"
        )


def _is_row_list(part: Any) -> bool:
    """Whether a part is a list of rows: a plain list or tuple without tensors and arrays."""
    if type(part) not in (list, tuple) or not part:
        return False
    inside = list(_inside(part))
    if any(isinstance(each, (Tensor, np.ndarray)) for each in inside):
        return False
    lists = [type(each).__name__ for each in inside if isinstance(each, (list, tuple))]
    if lists:
        raise TypeError(
            f"batch: expected a list of rows or a structure with tensors, got a "
            f"{type(part).__name__} that holds a {lists[0]} and no tensor, which may be either; "
            "give the lists names in a dict, or pad them and make them a tensor"
        )
    return True


def _inside(part: Any) -> Iterator[Any]:
    """All parts inside a part, at any depth."""
    children: Iterable[Any] = ()
    if isinstance(part, (list, tuple)):
        children = part
    elif isinstance(part, Mapping):
        children = part.values()
    elif _is_dataclass(part):
        children = [getattr(part, field.name) for field in dataclasses.fields(part)]
    for child in children:
        yield child
        yield from _inside(child)


def _is_dataclass(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def _map(
    function: Callable[[Any], Any], batch: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Any:
    """A batch with ``function`` of its leaves. Mappings and dataclasses of any type are no leaves.

    pytree knows only the types that are registered, and what it knows is global. So this function
    goes into mappings and dataclasses itself.
    """

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, PackedSequence):
            raise TypeError(
                "batch: expected tensors with one row for each sample, got a PackedSequence; pass "
                "padded sequences and their lengths, and pack them in the network"
            )
        if is_leaf(leaf):
            return function(leaf)
        if isinstance(leaf, Mapping):
            values = {key: _map(function, value, is_leaf) for key, value in leaf.items()}
            try:
                return type(leaf)(values)  # type: ignore[call-arg]
            except TypeError as error:
                raise TypeError(
                    "batch: expected mappings whose class takes a dict, got "
                    f"{type(leaf).__name__}; pass dict(...) of it"
                ) from error
        if _is_dataclass(leaf):
            result = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                value = _map(function, getattr(leaf, field.name), is_leaf)
                object.__setattr__(result, field.name, value)
            return result
        return function(leaf)

    return pytree.tree_map(
        replace, batch, is_leaf=lambda part: isinstance(part, PackedSequence) or is_leaf(part)
    )


def _checked_indices(indices: Any, size: int) -> Tensor:
    """Rows as a tensor ``[k]``."""
    if not isinstance(indices, Tensor):
        is_list = isinstance(indices, (Sequence, np.ndarray)) and not isinstance(indices, str)
        is_selection = is_list and hasattr(indices, "indices")
        if is_selection or not is_list:
            raise TypeError(
                f"indices: expected a tensor [k] or a list of ints, got {type(indices).__name__}"
                f"{'; pass its indices' if is_selection else ''}"
            )
        indices = torch.as_tensor(indices, dtype=None if len(indices) else torch.int64)
    if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
        is_mask = indices.dtype == torch.bool
        raise TypeError(
            f"indices: expected shape [k] of int64 or int32, got {list(indices.shape)} of "
            f"{indices.dtype}"
            + ("; pass indices.nonzero().flatten() in place of a mask" if is_mask else "")
        )
    if indices.device.type == "cpu" and checks.has_values(indices) and len(indices):
        least, most = (int(value) for value in indices.aminmax())
        if least < 0 or most >= size:
            raise ValueError(
                f"indices: expected rows in [0, {size}), got {least if least < 0 else most}"
            )
    return indices
