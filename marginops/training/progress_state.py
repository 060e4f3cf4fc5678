"""The check of a state of TrainingProgress, before anything takes it over."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from .dynamics.state import check_dict
from .dynamics.training_dynamics import TrainingDynamics
from .recording.recorder import RunRecorder
from .samplers.dynamics_sampler import DynamicsSampler
from .samplers.epoch_sampler import EpochSampler

VERSION = 1
_KEYS = {"version", "epoch", "position", "fingerprint", "dynamics", "sampler", "recorder"}


def check_state(
    state_dict: Any,
    dynamics: TrainingDynamics,
    sampler: EpochSampler | None,
    recorder: RunRecorder | None,
    fingerprint: str | None,
) -> None:
    """Check that a state is whole and fits, without a change of anything."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    if set(state_dict) != _KEYS:
        raise ValueError(
            f"state_dict: expected the keys {', '.join(sorted(_KEYS))}, got "
            f"{', '.join(sorted(map(str, state_dict)))}; pass the result of "
            "TrainingProgress.state_dict()"
        )
    if state_dict["version"] != VERSION:
        raise ValueError(f"state_dict: expected version {VERSION}, got {state_dict['version']!r}")
    for name in ("epoch", "position"):
        number = state_dict[name]
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"state_dict: expected {name} as an int in [0, 2**63), got {number!r}")
    theirs = state_dict["fingerprint"]
    if theirs is not None and not isinstance(theirs, str):
        raise ValueError(
            f"state_dict: expected fingerprint as a str or None, got {type(theirs).__name__}"
        )
    check_dict(dynamics, state_dict["dynamics"])
    if None not in (fingerprint, theirs) and fingerprint != theirs:
        raise ValueError(
            f"state_dict: expected the fingerprint {fingerprint!r} of this data set, got "
            f"{theirs!r}; the state is of another data set, so load one of this data set"
        )
    for name, part in (("sampler", sampler), ("recorder", recorder)):
        if (state_dict[name] is None) != (part is None):
            expected, got = ("None", "one") if part is None else ("one", "None")
            raise ValueError(
                f"state_dict: expected {expected} as the state of the {name}, got {got}; make the "
                f"progress with a {name} if and only if that of the state had one"
            )
    if sampler is not None:
        _check_sampler(state_dict, sampler)
    if recorder is not None:
        recorder.check_state_dict(state_dict["recorder"])


def _check_sampler(state_dict: Mapping[str, Any], sampler: EpochSampler) -> None:
    """Check the state of a sampler: a copy of the sampler loads it."""
    trial, dynamics = copy.copy(sampler), state_dict["dynamics"]
    if isinstance(trial, DynamicsSampler):
        trial.dynamics = SimpleNamespace(  # type: ignore[assignment]
            weights=dynamics["weights"], weights_version=dynamics["weights_version"]
        )
    trial.load_state_dict(state_dict["sampler"])
    if isinstance(trial, DynamicsSampler) and (
        state_dict["sampler"]["weights_version"] != dynamics["weights_version"]
    ):
        raise ValueError(
            f"state_dict: expected weights_version {state_dict['sampler']['weights_version']} in "
            f"the state of the dynamics, as in that of the sampler, got "
            f"{dynamics['weights_version']}"
        )
    if (trial.epoch, trial.position) != (state_dict["epoch"], state_dict["position"]):
        raise ValueError(
            f"state_dict: expected epoch {state_dict['epoch']} and position "
            f"{state_dict['position']} in the state of the sampler, got {trial.epoch} and "
            f"{trial.position}"
        )
    if dynamics["weights"] is not None and dynamics["weights_version"] == trial.epoch:
        iter(trial)  # looks at the weights
