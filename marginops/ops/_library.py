"""The dispatcher library: how an op gets its schema, reference, fake and gradient."""

from collections.abc import Callable
from typing import Any

import torch

from marginops import _native

_library = torch.library.Library("marginops", "DEF")


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> torch._ops.OpOverload:
    """Register an op of the ``marginops`` namespace and return its overload.

    Args:
        schema: The op's schema; its first argument is a tensor and decides the device.
        reference: Pure PyTorch; runs wherever there is no native kernel.
        fake: Shapes and dtypes of the results, for tracing.
        backward: The gradient, in terms of differentiable PyTorch and other ops of ours.
        setup_context: What the gradient needs, see ``torch.library.register_autograd``.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    op: torch._ops.OpOverload = getattr(torch.ops.marginops, name).default

    def load_or_reference(*args: Any) -> Any:
        # Reached only while no native kernel is registered: once the library is loaded, the
        # dispatcher prefers it, and neither calls nor compiled graphs come by here again.
        if _native.load(args[0].device.type):
            return op(*args)
        return reference(*args)

    _library.impl(name, load_or_reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"marginops::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"marginops::{name}", backward, setup_context=setup_context, lib=_library
        )
    return op


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
