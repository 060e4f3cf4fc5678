"""Registers ops with PyTorch's dispatcher: schema, reference, fake and gradient."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad

from marginops import _native

_ops = torch.library.Library("marginops", "DEF")
# A call of an op with a gradient passes through Python, which costs several microseconds. So each
# op has a twin of the same name in this namespace. The twin has the kernels and no gradient.
_kernels = torch.library.Library("marginops_kernels", "DEF")
_loading = threading.local()


class Op:
    """An op of the ``marginops`` namespace. Each subclass has one instance, called like a function.

    A subclass defines these attributes. Its methods are static, as those of a
    :class:`torch.autograd.Function`:

    ``schema``
        The op's schema. The first argument is a tensor and decides the device.
    ``reference``
        The op in pure PyTorch. It runs wherever there is no native kernel.
    ``fake``
        Returns empty tensors with the shapes and dtypes of the results, for tracing.
    ``setup_context``, ``backward``
        The first saves what the gradient needs, the second computes the gradient with
        differentiable PyTorch and with other ops. See
        :func:`torch.library.register_autograd`. If a gradient must flow through an
        op without ``backward``, that op raises NotImplementedError.
    ``has_kernels``
        Whether the native libraries may have kernels for the op.
    """

    schema: ClassVar[str]
    reference: ClassVar[Callable[..., Any]]
    fake: ClassVar[Callable[..., Any]]
    setup_context: ClassVar[Callable[..., None] | None] = None
    backward: ClassVar[Callable[..., Any] | None] = None
    has_kernels: ClassVar[bool] = True

    def __init__(self) -> None:
        self.name = self.schema.partition("(")[0]
        self._kernel_op = _define(_kernels, self.schema, self._make_fallback, self.fake)
        self._autograd_op = _define(_ops, self.schema, lambda _: self._kernel_op, self.fake)
        self._is_mutable = self._autograd_op._schema.is_mutable
        if self._is_mutable:
            return  # torch has no gradients for ops that change their arguments
        torch.library.register_autograd(
            f"marginops::{self.name}",
            self.backward or self._refuse_gradient,
            setup_context=self.setup_context,
            lib=_ops,
        )

    def __call__(self, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    if self._is_mutable:
                        raise NotImplementedError(
                            f"{self.name}: expected arguments that do not require a gradient, "
                            "because this op changes them; pass them with .detach()"
                        )
                    return self._autograd_op(*arguments)
        return self._kernel_op(*arguments)

    def _make_fallback(self, op: torch._ops.OpOverload) -> Callable[..., Any]:
        """Make what the dispatcher calls while no native kernel is registered.

        The fallback loads the native library. From then on the dispatcher calls the native kernel,
        from Python and from compiled graphs. Where there is none, the fallback runs the reference.
        """
        if not self.has_kernels:
            return self.reference

        def fallback(*arguments: Any) -> Any:
            # True inside the call of ``op`` below. With a native kernel the dispatcher would not
            # come here again, so there is none for this op or for this kind of tensor.
            if getattr(_loading, "op", None) is op:
                return self.reference(*arguments)
            if not _native.load(arguments[0].device.type):
                return self.reference(*arguments)
            _loading.op = op
            try:
                return op(*arguments)
            finally:
                _loading.op = None

        return fallback

    def _refuse_gradient(self, ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError(
            "marginops: second derivatives are not implemented, "
            f"and the op {self.name} has no gradient"
        )

    def _refuse_tangents(self, arguments: tuple[Any, ...]) -> None:
        """Raise an error for forward-mode derivatives, which PyTorch would silently take as 0."""
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(
                f"{self.name}: no forward-mode derivatives are implemented, only backward()"
            )


def _define(
    library: torch.library.Library,
    schema: str,
    make_kernel: Callable[[torch._ops.OpOverload], Callable[..., Any]],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define an op in a library. Its kernel on every device is ``make_kernel(op)``."""
    name = schema.partition("(")[0]
    library.define(schema)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, library.ns), name).default
    library.impl(name, make_kernel(op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    return op
