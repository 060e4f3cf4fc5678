"""Registers ops with PyTorch's dispatcher: schema, reference, fake and gradient."""

import threading
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad

from marginops import _native

from ._batches import Batch

_ops = torch.library.Library("marginops", "DEF")
# A call of an op with a gradient passes through Python, which costs several microseconds. So each
# op has a twin of the same name in this namespace. The twin has the kernels and no gradient. It is
# private: after a direct call of a twin, torch only warns in backward() that there is no gradient.
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
        differentiable PyTorch and with other ops. It gets the gradients of the results that are not
        in ``constants``: None for results that are not used, but it is not called if none is used.
        If a gradient must flow through an op without ``backward``, that op raises
        NotImplementedError.
    ``constants``
        Names and positions of results that have no gradient: all such floating-point results, and
        others if their position is to be left out of ``backward``.
    ``row_arguments``
        Names of arguments ``[N, ...]``, if row n of every result depends on their row n and on
        arguments without rows. Inside ``torch.vmap`` one call then computes the rows of all
        elements of the batch. ``call_batch`` may do so in another way.
    ``has_kernels``
        Whether the native libraries may have kernels for the op.
    """

    schema: ClassVar[str]
    reference: ClassVar[Callable[..., Any]]
    fake: ClassVar[Callable[..., Any]]
    setup_context: ClassVar[Callable[..., None] | None] = None
    backward: ClassVar[Callable[..., Any] | None] = None
    constants: ClassVar[tuple[tuple[str, int], ...]] = ()
    row_arguments: ClassVar[tuple[str, ...]] = ()
    has_kernels: ClassVar[bool] = True

    _apply: Any = None  # calls autograd's function; an op that changes its arguments has none
    _differentiable: tuple[int, ...] = ()  # positions of the results that pass through autograd

    def __init__(self) -> None:
        self.name = self.schema.partition("(")[0]
        self._kernel_op = _define(_kernels, self.schema, self._make_fallback, self._checked_fake)
        self._autograd_op = _define(
            _ops, self.schema, lambda _: self._kernel_op, self._checked_fake
        )
        if self._autograd_op._schema.is_mutable:
            _ops.impl(self.name, self._refuse_or_call, "Autograd")
            return
        constants = {index for _, index in self.constants}
        results = range(len(self._kernel_op._schema.returns))
        self._differentiable = tuple(index for index in results if index not in constants)
        function, direct_function, transformed_function = self._make_functions()
        # What Function.apply in Python adds to this is for torch.func only.
        apply: Any = vars(torch._C._FunctionBase)["apply"]
        self._apply = apply.__get__(None, direct_function)
        _ops.impl(self.name, function.apply, "Autograd")
        _ops.impl(self.name, transformed_function.apply, "FuncTorchDynamicLayerFrontMode")

    def __call__(self, *arguments: Any) -> Any:
        # Inside the transforms of torch.func and in forward mode, requires_grad does not tell
        # whether a derivative is needed.
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self._autograd_op(*arguments)
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, torch.Tensor) and argument.requires_grad:
                    if self._apply is None or _is_watched(arguments):
                        return self._autograd_op(*arguments)
                    return self._call_directly(arguments)
        # Who runs a traced graph later may need a gradient.
        if torch.compiler.is_compiling() or torch._C._get_tracing_state():
            return self._autograd_op(*arguments)
        return self._kernel_op._op(*arguments)

    def call_without_gradient(self, *arguments: Any) -> Any:
        """Call the op as inside ``torch.no_grad()``, in two microseconds less."""
        is_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return self(*arguments)
        finally:
            torch._C._set_grad_enabled(is_enabled)

    def _call_directly(self, arguments: tuple[Any, ...]) -> Any:
        """Do what the dispatcher would do for autograd, in fewer microseconds."""
        results: list[torch.Tensor] = []
        differentiable = self._apply(*arguments, results)
        if not results:  # no result is without a gradient
            return differentiable
        for index, value in zip(self._differentiable, differentiable, strict=True):
            results[index] = value
        return tuple(results)

    def _make_functions(self) -> tuple[Any, Any, Any]:
        """Make the autograd functions: for the dispatcher, for direct calls, and for torch.func.

        torch.func needs a forward without ``ctx``, which takes several microseconds more.
        """
        kernel_op, constants = self._kernel_op, self.constants
        positions = [index for _, index in constants]
        save = self.setup_context or (lambda *_: None)
        differentiate = self.backward or self._refuse_gradient
        schema, differentiable = kernel_op._schema, self._differentiable
        no_gradients = (None,) * len(schema.arguments)

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = kernel_op(*arguments)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*[output[index] for index in positions])
            save(ctx, arguments, output)
            return output

        # Each result that passes through autograd costs time in the forward and backward pass. So
        # the results without a gradient come in the list that is the last argument.
        def direct_forward(ctx: Any, *inputs: Any) -> Any:
            *arguments, results = inputs
            output = kernel_op._op(*arguments)
            ctx.set_materialize_grads(False)
            save(ctx, arguments, output)
            if not constants:
                return output
            results += output
            return tuple([output[index] for index in differentiable])

        def direct_backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            for grad in grads:
                if grad is not None:
                    return *differentiate(ctx, *grads), None
            return *no_gradients, None

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def backward(ctx: Any, *all_grads: torch.Tensor | None) -> Any:
            return direct_backward(ctx, *[all_grads[index] for index in differentiable])[:-1]

        # torch.func would take the gradient of a result that is marked as not differentiable as 0.
        # So its function marks none, and an unexpected gradient is an error here.
        def transformed_backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
            for name, index in constants:
                if grads[index] is not None:
                    raise NotImplementedError(
                        f"{self.name}: expected no use of {name} in what is differentiated, "
                        f"because it has no gradient; use {name}.detach()"
                    )
            return backward(ctx, *grads)

        def make(**methods: Callable[..., Any]) -> Any:
            methods["jvp"] = self._refuse_tangents
            static = {name: staticmethod(method) for name, method in methods.items()}
            return type(type(self).__name__, (torch.autograd.Function,), static)

        transformed_function = make(
            forward=lambda *arguments: kernel_op(*arguments),
            setup_context=setup_context,
            backward=transformed_backward,
            vmap=self._map_over_batch,
        )
        return (
            make(forward=forward, backward=backward),
            make(forward=direct_forward, backward=direct_backward),
            transformed_function,
        )

    def call_batch(self, batch: Batch) -> Any:
        """Call the op once for all elements of the batch of ``torch.vmap``.

        The results have the batch as their first dimension. They are None if one call cannot
        compute them.
        """
        if not self.row_arguments or not batch.names <= {*self.row_arguments}:
            return None
        values = batch.values | {name: batch.joined(name) for name in self.row_arguments}
        first = self.row_arguments[0]
        rows = batch.values[first].shape[first in batch.names]
        results = self(*values.values())
        if isinstance(results, torch.Tensor):
            return batch.split(results, rows)
        return tuple(batch.split(result, rows) for result in results)

    def _map_over_batch(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        """Call the op once if possible, else once for each element of the batch."""
        names = [argument.name for argument in self._kernel_op._schema.arguments]
        batch = Batch.of_dims(info.batch_size, names, arguments, in_dims)
        results = self.call_batch(batch)
        if results is None:
            if batch.size == 0:
                raise NotImplementedError(
                    f"{self.name}: expected a batch for vmap, got a size of 0"
                )
            each = [self(*values) for values in batch.elements()]
            if isinstance(each[0], torch.Tensor):
                results = torch.stack(each)
            else:
                results = tuple(map(torch.stack, zip(*each, strict=True)))
        return results, 0 if isinstance(results, torch.Tensor) else (0,) * len(results)

    def _refuse_or_call(self, *arguments: Any) -> Any:
        """Call an op that changes its arguments, for which autograd has no gradient."""
        if torch.is_grad_enabled() and any(
            isinstance(value, torch.Tensor) and value.requires_grad for value in arguments
        ):
            raise NotImplementedError(
                f"{self.name}: expected arguments that do not require a gradient, "
                "because this op changes them; pass them with .detach()"
            )
        if forward_ad._current_level >= 0 and any(
            isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
            for value in arguments
        ):
            self._refuse_tangents(None)
        return self._kernel_op(*arguments)

    def _make_fallback(self, op: torch._ops.OpOverload) -> Callable[..., Any]:
        """Make what the dispatcher calls while no native kernel is registered.

        The fallback loads the native library. From then on the dispatcher calls the native kernel,
        from Python and from compiled graphs. Where there is none, the fallback runs the reference.
        """

        def fallback(*arguments: Any) -> Any:
            self._check_tensors(arguments)
            # ``_loading.op`` is ``op`` inside the call of ``op`` below. With a native kernel the
            # dispatcher would not come here again, so there is none for this op or for this kind
            # of tensor.
            if not self.has_kernels or getattr(_loading, "op", None) is op:
                return self.reference(*arguments)
            if not _native.load(arguments[0].device.type):
                return self.reference(*arguments)
            _loading.op = op
            try:
                return op(*arguments)
            finally:
                _loading.op = None

        return fallback

    def _checked_fake(self, *arguments: Any) -> Any:
        # The dispatcher also comes here if some tensors are on the meta device and others are not.
        self._check_tensors(arguments)
        return self.fake(*arguments)

    def _check_tensors(self, arguments: tuple[Any, ...]) -> None:
        """Check the kind and the device of all tensors; native kernels only see dense ones.

        Numbers in 0-d tensors may be on the CPU.
        """
        first = arguments[0]
        names = self._kernel_op._schema.arguments
        for value, argument in zip(arguments, names, strict=True):
            if not isinstance(value, torch.Tensor):
                continue
            if value.layout != torch.strided or value.is_quantized:
                raise RuntimeError(
                    f"{argument.name}: expected a dense (strided) tensor, "
                    f"got layout {value.layout} and dtype {value.dtype}"
                )
            is_number = value.dim() == 0 and value.is_cpu and not argument.is_write
            if value.device != first.device and not is_number:
                raise RuntimeError(
                    f"{argument.name}: expected device {first.device} as {names[0].name}, "
                    f"got {value.device}"
                )

    def _refuse_gradient(self, ctx: Any, *grads: torch.Tensor | None) -> Any:
        raise NotImplementedError(
            "marginops: second derivatives are not implemented, "
            f"and the op {self.name} has no gradient"
        )

    def _refuse_tangents(self, ctx: Any, *tangents: torch.Tensor | None) -> Any:
        raise NotImplementedError(
            f"{self.name}: no forward-mode derivatives are implemented, only backward()"
        )


def _is_watched(arguments: tuple[Any, ...]) -> bool:
    """Whether something has to see the op itself: a graph that is traced, a mode, a subclass."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state()
        or torch.overrides.has_torch_function(arguments)
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
