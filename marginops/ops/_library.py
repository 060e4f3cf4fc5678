"""The dispatcher library: how an op gets its schema, reference, fake and gradient."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from marginops import _native

_library = torch.library.Library("marginops", "DEF")
_loading = threading.local()


class Op:
    """An op of the ``marginops`` namespace: call it, or its ``reference`` in pure PyTorch.

    A differentiable op is two ops of the dispatcher: ``name`` has the gradient, and
    ``name_forward`` the kernels. The gradient of ``torch.library`` is a detour through Python of
    several microseconds, so calls that need none go to ``name_forward`` directly.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        forward: torch._ops.OpOverload,
        differentiable: torch._ops.OpOverload | None,
    ) -> None:
        self.name = name
        self.reference = reference
        self._forward = forward
        self._differentiable = differentiable

    def __call__(self, *arguments: Any) -> Any:
        if self._differentiable is not None:
            if forward_ad._current_level >= 0:
                _refuse_tangents(self.name, arguments)
            if torch.is_grad_enabled():
                for argument in arguments:
                    if isinstance(argument, torch.Tensor) and argument.requires_grad:
                        return self._differentiable(*arguments)
        return self._forward(*arguments)


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    native: bool = True,
) -> Op:
    """Register an op of the ``marginops`` namespace.

    Args:
        schema: The op's schema; its first argument is a tensor and decides the device.
        reference: Pure PyTorch; runs wherever there is no native kernel.
        fake: Shapes and dtypes of the results, for tracing.
        backward: The gradient, in terms of differentiable PyTorch and other ops of ours.
        setup_context: What the gradient needs, see ``torch.library.register_autograd``.
        native: Whether the native libraries may have kernels for it.
    """
    make_kernel = _load_or(reference) if native else lambda _: reference
    name, signature = schema.split("(", 1)
    if backward is None:
        return Op(name, reference, _define(schema, make_kernel, fake), None)
    forward = _define(f"{name}_forward({signature}", make_kernel, fake)
    differentiable = _define(schema, lambda _: forward, fake)
    torch.library.register_autograd(
        f"marginops::{name}", backward, setup_context=setup_context, lib=_library
    )
    return Op(name, reference, forward, differentiable)


def raise_no_second_derivative(name: str) -> Callable[..., Any]:
    """A gradient for ops that compute gradients themselves."""

    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise NotImplementedError(f"{name}: second derivatives are not implemented")

    return backward


def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The context of a gradient that only raises."""


def _define(
    schema: str,
    make_kernel: Callable[[torch._ops.OpOverload], Callable[..., Any]],
    fake: Callable[..., Any],
) -> torch._ops.OpOverload:
    name = schema.partition("(")[0]
    _library.define(schema)
    op: torch._ops.OpOverload = getattr(torch.ops.marginops, name).default
    _library.impl(name, make_kernel(op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"marginops::{name}", fake, lib=_library)
    return op


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    """Without this, PyTorch would take the derivative for zero without a word."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{name}: no forward-mode derivatives, only backward")


def _load_or(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that is reached only while no native one is registered.

    Once the library is loaded the dispatcher prefers what it has, and neither calls nor compiled
    graphs come by here again.
    """

    def make_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            # Called by itself: the library has no kernel for this op or this kind of tensor.
            if getattr(_loading, "op", None) is op:
                return reference(*arguments)
            if not _native.load(arguments[0].device.type):
                return reference(*arguments)
            _loading.op = op
            try:
                return op(*arguments)
            finally:
                _loading.op = None

        return kernel

    return make_kernel


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
