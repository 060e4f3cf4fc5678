"""Metrics whose state is checked before it is loaded or merged."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.metric import CompositionalMetric
from torchmetrics.utilities.distributed import gather_all_tensors

from ._summaries import Entry

State = dict[str, Any]
_LONGEST = 2**12  # bytes of a configuration


class CheckedMetric(Metric):
    """A metric whose state tells which arguments it depends on.

    The state keeps its dtypes, also in ``module.half()``. Only its device changes.

    torchmetrics lets metrics of a collection share one state for good as soon as their states are
    equal. The state ``configuration`` keeps apart what depends on different arguments. It holds the
    text of :attr:`arguments` as bytes.
    """

    #: The states that the class itself adds. A subclass may add others.
    own_states: ClassVar[tuple[str, ...]]

    configuration: Tensor

    def __init__(self, arguments: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        update = type(self).update
        #: What the state depends on: the class whose method fills it, and arguments of the metric.
        self.arguments = {"metric": update.__qualname__.removesuffix(".update"), **arguments}
        text = torch.tensor(list(json.dumps(self.arguments).encode()), dtype=torch.uint8)
        self.add_state("configuration", text, persistent=True)
        if not update.__module__.startswith(__package__):
            # Nobody knows what else the update of a subclass depends on. NaN equals no other state.
            self.add_state("unshared", torch.tensor(math.nan), dist_reduce_fx="max")

    def merge_state(self, incoming_state: Metric | State) -> None:
        """Merge the samples of another metric into this one, as if it had seen both in turn.

        Args:
            incoming_state: A metric of the same class with the same arguments, or its
                ``metric_state`` or ``state_dict()``. It stays as it is.

        Raises:
            TypeError, ValueError: ``incoming_state`` is no metric of this class, it has other
                arguments, or its state is damaged. The metric stays as it was.
        """
        state: Any = incoming_state
        calls = 1
        if isinstance(incoming_state, Metric) and type(incoming_state).update is type(self).update:
            state, calls = incoming_state.metric_state, incoming_state.update_count
        if not isinstance(state, Mapping):
            raise TypeError(
                f"incoming_state: expected a metric {self.arguments['metric']} or its state, "
                f"got {type(state).__name__}"
            )
        fault = self._fault(state)
        if fault is not None:
            raise ValueError(f"incoming_state: {fault}")
        state = self._copies(state)
        self._take(self._merged_in_order(self.metric_state, state), state)
        self._update_count += calls

    def __getitem__(self, idx: int | str) -> CompositionalMetric:
        """A metric of one value of the result, for wrappers that take no other.

        Args:
            idx: The name of a field or of a scalar, or the index of a field.

        Raises:
            ValueError: The result has no such value.
        """
        if not isinstance(idx, str):
            return super().__getitem__(idx)
        if idx not in self._entries():
            raise ValueError(f"idx: expected one of {', '.join(self._entries())}, got {idx!r}")
        return CompositionalMetric(Entry(idx), self, None)

    def _entries(self) -> list[str]:
        """The names of all fields and scalars of the result."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all samples."""
        # torchmetrics would empty lists in place, which a wrapper such as Running has kept.
        for name, default in self._defaults.items():
            if isinstance(default, list):
                setattr(self, name, [])
        super().reset()

    def _merged(self, earlier: State, later: State) -> State:
        """The metric's own states, for the samples of two states that are known to be sound."""
        raise NotImplementedError

    def _merged_in_order(self, earlier: State, later: State) -> State:
        """As :meth:`_merged`, if all samples of one state came before those of the other."""
        return self._merged(earlier, later)

    def _value_fault(self, state: Mapping[str, Any]) -> str | None:
        """What is impossible about the values of a state, "expected ..., got ...", or None."""
        raise NotImplementedError

    def _reduce_states(self, incoming_state: State) -> None:
        # torchmetrics merges with this method in forward and in the wrapper Running. It does not
        # read values, so that forward does not wait for the device.
        fault = self._kind_fault(incoming_state)
        if fault is not None:
            raise ValueError(f"incoming_state: {fault}")
        self._take(self._merged(incoming_state, self.metric_state), incoming_state)

    def _take(self, merged: State, incoming: State) -> None:
        """Set merged states. If there are others, as of a subclass, torchmetrics merges them."""
        merged["configuration"] = self.configuration
        if merged.keys() != self._defaults.keys():
            super()._reduce_states({**self.metric_state, **incoming})
        for name, value in merged.items():
            setattr(self, name, value)
        self._computed = None

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., Any] = gather_all_tensors,
        process_group: Any | None = None,
    ) -> None:
        """Exchange the states of all processes, once all are known to have the same arguments."""
        group = process_group or self.process_group
        own = self.configuration
        for other in dist_sync_fn(own, group=group):
            fault = self._configuration_fault(other)
            if fault is not None:
                raise ValueError(f"metrics of the processes: {fault}")
        super()._sync_dist(dist_sync_fn, process_group)
        self.configuration = own

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        return super()._apply(lambda state: state.to(fn(state.new_empty(0)).device), exclude_state)

    def _load_from_state_dict(
        self,
        state_dict: State,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [name for name in self._defaults if prefix + name in state_dict]
        state = {name: state_dict.pop(prefix + name) for name in names}
        known = len(unexpected_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not state:  # as in the checkpoint of a model that had no metric
            missing_keys.extend(prefix + name for name, kept in self._persistent.items() if kept)
            return
        # torch does not tell a module whether other keys are an error, so here they always are.
        more = unexpected_keys[known:]
        fault = self._fault(state) or (
            f"expected only {', '.join(names)}, got also {', '.join(more)}" if more else None
        )
        if fault is not None:
            place = f" (the metric {prefix.removesuffix('.')})" if prefix else ""
            error_msgs.append(f"state_dict: {fault}{place}")
            return
        for name, value in self._copies(state).items():
            setattr(self, name, value)
        self._computed = None
        self._forward_cache = None

    def _copies(self, state: Mapping[str, Any]) -> State:
        """The states as independent tensors on the device of the metric."""

        def copy(value: Tensor) -> Tensor:
            return value.detach().to(self.configuration.device, copy=True)

        return {
            name: [copy(item) for item in value] if isinstance(value, list) else copy(value)
            for name, value in state.items()
            if name in self._defaults
        }

    def _fault(self, state: Mapping[str, Any]) -> str | None:
        """What is wrong with a state, "expected ..., got ...", or None."""
        return (
            self._missing_fault(state, ["configuration"])
            or self._configuration_fault(state["configuration"])
            or self._missing_fault(state, self._own_names())
            or self._kind_fault(state)
            or self._value_fault(state)
        )

    def _missing_fault(self, state: Mapping[str, Any], names: list[str]) -> str | None:
        missing = [name for name in names if name not in state]
        return f"expected {', '.join(missing)}, got {', '.join(state)}" if missing else None

    def _own_names(self) -> list[str]:
        return [name for name in self._defaults if name in (*self.own_states, "configuration")]

    def _configuration_fault(self, configuration: Any) -> str | None:
        own = self.arguments
        try:
            other: dict[str, Any] = json.loads(bytes(configuration[:_LONGEST].tolist()))
            differing = [name for name in own if other.get(name) != own[name]]
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return f"expected a configuration with {_listed(own, own)}, got {_short(configuration)}"
        if not differing:
            return None
        return f"expected {_listed(own, differing)}, got {_listed(other, differing)}"

    def _kind_fault(self, state: Mapping[str, Any]) -> str | None:
        """What is wrong with types, dtypes and shapes of a state."""
        for name in self._own_names():
            value, default = state[name], self._defaults[name]
            if isinstance(default, list):
                fault = _list_fault(name, value)
            else:
                fault = _tensor_fault(name, value, default.dtype, default.shape)
            if fault is not None:
                return fault
        return None


def _listed(arguments: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={arguments.get(name)!r}" for name in names)


def _list_fault(name: str, value: Any) -> str | None:
    if not isinstance(value, list):
        return f"expected {name} as a list of tensors, got {_short(value)}"
    faults = (_tensor_fault(f"{name}[{i}]", item, torch.float64) for i, item in enumerate(value))
    return next(filter(None, faults), None)


def _tensor_fault(
    name: str, value: Any, dtype: torch.dtype, shape: torch.Size | None = None
) -> str | None:
    form = "[N]" if shape is None else str(list(shape))
    expected = f"expected {name} as a tensor {form} of {dtype}"
    if not isinstance(value, Tensor):
        return f"{expected}, got {_short(value)}"
    if value.layout != torch.strided or value.is_meta:
        return f"{expected} with values, got layout {value.layout} on device {value.device}"
    wrong_shape = value.dim() != 1 if shape is None else value.shape != shape
    if value.dtype != dtype or wrong_shape:
        return f"{expected}, got {list(value.shape)} of {value.dtype}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"{expected} without repeated elements, got an expanded tensor"
    return None


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    return repr(value) if value is None or isinstance(value, str) else type(value).__name__
