"""Tensors of any number of dimensions as the rows that the kernels read.

The kernels take a matrix whose rows lie evenly in memory. Logits ``[B, T, C]`` are such a matrix,
but a slice such as ``logits[:, :-1]`` is not: its rows have gaps. Then the matrix also holds the
rows in the gaps. They count as ignored, and nobody sees their results. That is several times
faster than a copy of the logits.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import has_values

# A copy of the logits costs several times what the kernel does, so the matrix may have up to twice
# as many rows as the tensor.
_MOST_ROWS = 2


class RowLayout(NamedTuple):
    """Where the rows of a tensor are in the matrix that the kernels read.

    Attributes:
        shape: All dimensions of the tensor but the last.
        strides: The distances of neighbours in these dimensions, in rows of the matrix. None if
            the rows follow each other, in the matrix as in the tensor.
        num_rows: The number of rows of the matrix.
        row_stride: The distance of two rows of the matrix, in elements.
    """

    shape: torch.Size
    strides: tuple[int, ...] | None = None
    num_rows: int = 0
    row_stride: int = 0

    def matrix(self, tensor: Tensor) -> Tensor:
        """The matrix of a tensor. It is a view, or a copy if there is no view."""
        if self.strides is None:
            return tensor.flatten(0, -2)
        if torch.is_grad_enabled() and tensor.requires_grad:
            matrix: Tensor = _Matrix.apply(tensor, self)
            return matrix
        return self.view(tensor)

    def view(self, tensor: Tensor) -> Tensor:
        """The matrix of a tensor whose rows do not follow each other."""
        return tensor.as_strided(
            (self.num_rows, tensor.shape[-1]), (self.row_stride, tensor.stride(-1))
        )

    def column(self, values: Tensor, gap: float) -> Tensor:
        """One value for each row of the matrix; ``gap`` for the rows that are not in the tensor."""
        if self.strides is None:
            return values.flatten()
        column = values.new_full((self.num_rows,), gap)
        column.as_strided(self.shape, self.strides).copy_(values)
        return column

    def restore(self, column: Tensor) -> Tensor:
        """The results of the rows in the shape of the tensor."""
        if self.strides is None:
            return column.view(self.shape)
        return column.as_strided(self.shape, self.strides).contiguous()


def row_layout(tensor: Tensor, has_gaps: bool = True) -> RowLayout:
    """The layout of a tensor ``[..., D]``. Without ``has_gaps`` the matrix has no other rows."""
    shape = tensor.shape[:-1]
    if not has_values(tensor):  # strides are those of memory only where there are values
        return RowLayout(shape)
    sizes = [(stride, size) for size, stride in zip(shape, tensor.stride(), strict=False)]
    long = [(stride, size) for stride, size in sizes if size > 1]
    if not long or not all(shape) or _follow_each_other(long):
        return RowLayout(shape)
    unit, span = min(long)[0], 1
    for stride, size in sorted(long):
        if unit == 0 or stride % unit or stride // unit < span:
            return RowLayout(shape)
        span += (size - 1) * (stride // unit)
    rows = shape.numel()
    if span > (_MOST_ROWS * rows if has_gaps else rows):
        return RowLayout(shape)
    strides = tuple(stride // unit if size > 1 else 1 for stride, size in sizes)
    return RowLayout(shape, strides, span, unit)


def _follow_each_other(sizes: list[tuple[int, int]]) -> bool:
    """Whether one stride leads through all dimensions, given by stride and size."""
    return all(
        stride == size * following for (stride, _), (following, size) in itertools.pairwise(sizes)
    )


class _Matrix(torch.autograd.Function):
    """The view of :meth:`RowLayout.view`. Its gradient leaves out the rows in the gaps."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, layout: RowLayout) -> Tensor:
        ctx.layout = layout
        return layout.view(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape, strides, _, _ = ctx.layout
        columns = grad.shape[1]
        strides = tuple(stride * columns for stride in strides)
        return grad.contiguous().as_strided((*shape, columns), (*strides, 1)), None
