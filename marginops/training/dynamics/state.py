"""The state of TrainingDynamics as a dictionary: written, checked and restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ops.dynamics import COUNTS, VALUES
from .values import DynamicsValues

VERSION = 1
_LAST_ROW = 2**32 - 1


def check_decay(decay: Any) -> None:
    """Check that a decay is a number in [0, 1)."""
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay: expected a float, got {type(decay).__name__}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected a value in [0, 1), got {decay}")


def to_dict(dynamics: DynamicsValues) -> dict[str, Any]:
    """The state of dynamics as numbers and tensors on the CPU, all of them copies."""
    state, weights = dynamics._state, dynamics.weights
    return {
        "version": VERSION,
        "num_samples": dynamics.num_samples,
        "decay": dynamics.decay,
        "values": state.values.to("cpu", copy=True),
        "counts": state.counts.to("cpu", copy=True),
        "last_step": (state.last_seen >> 32).cpu(),
        "totals": state.totals.to("cpu", copy=True),
        "weights": None if weights is None else weights.to("cpu", copy=True),
        "weights_version": dynamics.weights_version,
    }


def load_dict(dynamics: DynamicsValues, state_dict: Any) -> None:
    """Check a whole state and then assign it."""
    check_dict(dynamics, state_dict)
    state, weights = dynamics._state, state_dict["weights"]
    state.values.copy_(state_dict["values"])
    state.counts.copy_(state_dict["counts"])
    # The row of the last visit means nothing after its update, so the state does without it.
    state.last_seen.copy_(state_dict["last_step"]).bitwise_left_shift_(32).bitwise_or_(_LAST_ROW)
    state.totals.copy_(state_dict["totals"])
    dynamics.weights = None if weights is None else weights.to(dynamics.device, copy=True)
    dynamics.weights_version = state_dict["weights_version"]
    dynamics._common_nonfinite = dynamics.num_nonfinite


def check_dict(dynamics: DynamicsValues, state_dict: Any) -> None:
    """Check that a dictionary is a whole state of dynamics with the same arguments."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    if state_dict.get("version") != VERSION:
        raise ValueError(
            f"state_dict: expected version {VERSION}, got {state_dict.get('version')!r}; "
            "pass the result of TrainingDynamics.state_dict()"
        )
    count = dynamics.num_samples
    forms = {
        "values": (torch.float32, [count, len(VALUES)]),
        "counts": (torch.int32, [count, len(COUNTS)]),
        "last_step": (torch.int64, [count]),
        "totals": (torch.int64, [2]),
        "weights": (torch.float32, [count]),
    }
    numbers = {"num_samples": count, "decay": dynamics.decay}
    expected = {"version", *numbers, *forms, "weights_version"}
    if set(state_dict) != expected:
        raise ValueError(
            f"state_dict: expected the keys {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(map(str, state_dict)))}"
        )
    for name, own in numbers.items():
        if state_dict[name] != own:
            raise ValueError(f"state_dict: expected {name} {own}, got {state_dict[name]!r}")
    for name, (dtype, shape) in forms.items():
        if name != "weights" or state_dict[name] is not None:
            _check_form(name, state_dict[name], dtype, shape)
    version = state_dict["weights_version"]
    if type(version) is not int or version < -1:
        raise ValueError(f"state_dict: expected weights_version as an int >= -1, got {version!r}")
    _check_content(*(state_dict[name] for name in forms))


def _check_form(name: str, value: Any, dtype: torch.dtype, shape: list[int]) -> None:
    form = f"{name} as a tensor {shape} of {dtype}"
    if not isinstance(value, Tensor):
        raise ValueError(f"state_dict: expected {form}, got {type(value).__name__}")
    if value.dtype != dtype or list(value.shape) != shape or value.layout != torch.strided:
        raise ValueError(f"state_dict: expected {form}, got {list(value.shape)} of {value.dtype}")


def _check_content(
    values: Tensor, counts: Tensor, last_step: Tensor, totals: Tensor, weights: Tensor | None
) -> None:
    """Check what holds for every state."""
    steps = int(totals[0])
    count, correct, learnt, forgotten = counts.unbind(1)
    change = learnt - forgotten
    rules = {
        "totals >= 0": totals >= 0,
        f"last_step in [-1, {steps})": (last_step >= -1) & (last_step < steps),
        "counts >= 0": (counts >= 0).all(1),
        "no visits of samples that were never seen": (count == 0) | (last_step >= 0),
        "no more correct visits than visits": correct <= count,
        "learnt no more often than correct": learnt <= correct,
        "forgotten no more often than not correct": forgotten <= count - correct,
        "forgotten as often as learnt, or once less": (change == 0) | (change == 1),
        "a squared deviation >= 0": ~(values[:, VALUES.index("confidence_m2")] < 0),
    }
    if weights is not None:
        rules["weights >= 0"] = weights >= 0
    for rule, holds in rules.items():
        if not holds.all():
            place = int((~holds).nonzero()[0])
            raise ValueError(f"state_dict: expected {rule}, which fails at index {place}")
