"""Ops of a linear head, for any place of its classes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import result_dtype
from ._batches import Batch
from ._library import Op
from .linear_head import ONE_PROCESS, LinearHead, Place, Tensors
from .margin_gradient import write

_DEFAULTS = tuple(LinearHead._field_defaults.values())
Gradients = dict[str, Tensor | None]
Kept = tuple[Tensor | None, ...]


class LinearOp(Op):
    """An op of a linear head.

    Its arguments are some of the fields of :class:`LinearHead`, tensors first. If one of them is
    ``k``, the second result is the indices, and ``constants`` names it. If the classes are in
    several processes, :class:`_DistributedFunction` calls the same methods, because a group of
    processes cannot be an argument of an op. A subclass defines them as static methods:

    ``compute``
        The results of a head.
    ``empty``
        Uninitialized results of a head.
    ``keep``
        What the gradient needs of the results. The last argument has the names of the fields that
        need a gradient.
    ``differentiate``
        The gradients in fields of a head by name, from what is kept, the gradients of the results
        that are not in ``constants``, and the names of the fields that need a gradient. Where k
        rows are selected, the head has these rows only.
    """

    compute: ClassVar[Callable[..., Tensors]]
    empty: ClassVar[Callable[..., Tensors]]
    keep: ClassVar[Callable[..., Kept]]
    differentiate: ClassVar[Callable[..., Gradients]]
    has_kernels = False

    def __init__(self) -> None:
        super().__init__()
        arguments = self._kernel_op._schema.arguments
        self._names = [argument.name for argument in arguments]
        self._num_tensors = sum("Tensor" in str(argument.type) for argument in arguments)
        # A head takes its fields from the arguments of the op, and the others from the defaults.
        # The place comes first, because the first of equal names counts.
        names = [*self._names, "place", *LinearHead._field_defaults]
        self._take_fields = operator.itemgetter(*map(names.index, LinearHead._fields))

    def call(self, head: LinearHead) -> Any:
        """The results of a head, wherever its classes are."""
        arguments = [getattr(head, name) for name in self._names]
        if head.place is ONE_PROCESS:
            return self(*arguments)
        return _DistributedFunction.apply(*arguments, head.place, self)

    def head(self, arguments: Any, place: Place = ONE_PROCESS) -> LinearHead:
        """The head with these arguments of the op. Its ``shape`` is not known."""
        return LinearHead._make(self._take_fields((*arguments, place, *_DEFAULTS)))

    def reference(self, *arguments: Any) -> Tensors:
        return self.compute(self.head(arguments))

    def fake(self, *arguments: Any) -> Tensors:
        return self.empty(self.head(arguments))

    def setup_context(
        self, ctx: Any, inputs: Any, output: Tensors, place: Place = ONE_PROCESS
    ) -> None:
        """Save what :meth:`backward` needs, for classes at any place."""
        # Autograd's functions have more inputs than the op.
        needs = zip(self._names, ctx.needs_input_grad, strict=False)
        ctx.needs_grad = {name for name, needs_grad in needs if needs_grad}
        tensors, ctx.numbers = inputs[: self._num_tensors], inputs[self._num_tensors :]
        ctx.place = place
        selects = "k" in self._names and inputs[self._names.index("k")] is not None
        kept = self.keep(output, ctx.needs_grad)
        ctx.save_for_backward(*tensors, output[1] if selects else None, *kept)

    def backward(self, ctx: Any, *grads: Tensor | None) -> Any:
        needs_grad = ctx.needs_grad
        saved = ctx.saved_tensors  # checkpointing lets each be read only once
        indices, *kept = saved[self._num_tensors :]
        head = self.head((*saved[: self._num_tensors], *ctx.numbers), ctx.place)
        chosen = head if head.k is None else head.chosen(indices)
        gradients = self.differentiate(chosen, kept, grads, needs_grad)
        if head.k is not None and "input" in needs_grad:
            rows = gradients["input"]
            assert rows is not None
            zeros = rows.new_zeros(head.input.shape)
            # In place, because autocast fails on mixed dtypes in index_copy, not in index_copy_.
            gradients["input"] = write("index_copy_", zeros, 0, indices, rows)
        return [gradients.get(name) if name in needs_grad else None for name in self._names]

    def call_batch(self, batch: Batch) -> Any:
        """Rows cannot be joined where k of each element are selected."""
        return super().call_batch(batch) if batch.values.get("k") is None else None


class _DistributedFunction(torch.autograd.Function):
    """An op of a head whose classes are in several processes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensors:
        *arguments, place, op = inputs
        results: Tensors = op.compute(op.head(arguments, place))
        ctx.op = op
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(results[index] for _, index in op.constants))
        op.setup_context(ctx, arguments, results, place)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # torch's once_differentiable would silently leave out the second derivatives of the weight.
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "marginops: second derivatives are not implemented with group=; "
                "call backward() without create_graph=True"
            )
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        op = ctx.op
        return *op.backward(ctx, *[grads[index] for index in op._differentiable]), None, None


def empty_results(head: LinearHead, *kinds: str) -> Tensors:
    """Uninitialized results: a "value" of the result dtype, an int64 "class", "pair" or "index"."""
    rows: Any = head.input.shape[0] if head.k is None else head.k
    shapes = {"pair": (rows, 2), "index": (0 if head.k is None else rows,)}
    dtype = result_dtype(head.input.dtype)
    return tuple(
        head.input.new_empty(
            shapes.get(kind, (rows,)), dtype=dtype if kind == "value" else torch.int64
        )
        for kind in kinds
    )
