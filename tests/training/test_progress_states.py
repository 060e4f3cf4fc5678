"""TrainingProgress: states and arguments that do not fit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helpers.dynamics_batches import assert_same_dynamics
from helpers.progress_runs import MAKE, N, run
from helpers.seen import seen
from marginops.training import (
    TrainingDynamics,
    TrainingProgress,
    WeightedSampler,
)


def state_in_an_epoch() -> dict[str, Any]:
    progress = TrainingProgress(MAKE["margins"](), fingerprint="digits")
    run(progress, 4)
    return progress.state_dict()


def without(name: str) -> Callable[[Any], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


def within(part: str, **changes: Any) -> Callable[[Any], Any]:
    return lambda state: {**state, part: {**state[part], **changes}}


DAMAGE: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no mapping": (lambda state: 3, TypeError, "state_dict: expected a mapping, got int"),
    "a key less": (without("epoch"), ValueError, "state_dict: expected the keys .*; pass the"),
    "a key more": (lambda state: {**state, "a": 1}, ValueError, "expected the keys .*, got a, "),
    "the dynamics alone": (lambda state: state["dynamics"], ValueError, "expected the keys"),
    "version": (lambda state: {**state, "version": 2}, ValueError, "expected version 1, got 2"),
    "epoch": (lambda state: {**state, "epoch": -1}, ValueError, "expected epoch as an int .* -1"),
    "bool": (
        lambda state: {**state, "epoch": True},
        ValueError,
        "expected epoch as an int .* True",
    ),
    "float": (lambda state: {**state, "position": 1.0}, ValueError, "expected position as an int"),
    "other epoch": (lambda state: {**state, "epoch": 2}, ValueError, "expected epoch 2 and pos"),
    "other position": (lambda state: {**state, "position": 3}, ValueError, "and position 3 in"),
    "data": (lambda state: {**state, "fingerprint": "faces"}, ValueError, "'digits' .* 'faces'"),
    "text": (lambda state: {**state, "fingerprint": 3}, ValueError, "fingerprint as a str or None"),
    "no sampler": (lambda state: {**state, "sampler": None}, ValueError, "expected one .*got None"),
    "seed": (within("sampler", seed=7), ValueError, "expected seed 4, got 7"),
    "position of the sampler": (within("sampler", position=31), ValueError, "a position in"),
    "weights of another epoch": (within("dynamics", weights_version=0), ValueError, "weights"),
    "no dynamics": (lambda state: {**state, "dynamics": None}, TypeError, "expected a mapping"),
    "size": (
        lambda state: {**state, "dynamics": TrainingDynamics(N + 1).state_dict()},
        ValueError,
        f"expected num_samples {N}, got {N + 1}",
    ),
    "counts": (
        within("dynamics", counts=torch.ones(N, 3, dtype=torch.int32)),
        ValueError,
        "expected counts as a tensor",
    ),
    "too few weights": (
        within("dynamics", weights=torch.ones(N).cumsum(0).gt(60).float()),
        ValueError,
        "expected at least num_samples, 30, positive weights, got 15",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_state_that_does_not_fit_changes_nothing(case: str) -> None:
    damage, kind, message = DAMAGE[case]
    progress = TrainingProgress(MAKE["margins"](), fingerprint="digits")
    run(progress, 2)
    before, rest = progress.state_dict(), list(progress.sampler)
    with pytest.raises(kind, match=message):
        progress.load_state_dict(damage(copy.deepcopy(state_in_an_epoch())))
    after = progress.state_dict()
    assert_same_dynamics(progress.dynamics, loaded(before).dynamics)
    assert [after[name] for name in ("epoch", "position", "sampler")] == [
        before[name] for name in ("epoch", "position", "sampler")
    ]
    assert list(progress.sampler) == rest
    progress.load_state_dict(state_in_an_epoch())
    assert (progress.epoch, progress.position) == (1, 12)


def loaded(state: dict[str, Any]) -> TrainingProgress:
    progress = TrainingProgress(MAKE["margins"](), fingerprint="digits")
    progress.load_state_dict(state)
    return progress


def test_a_state_of_another_kind_of_sampler() -> None:
    state = state_in_an_epoch()
    with pytest.raises(ValueError, match="expected reduced_at as an int"):
        TrainingProgress(MAKE["shrink"]()).load_state_dict(state)
    with pytest.raises(ValueError, match="expected None as the state of the sampler, got one"):
        TrainingProgress(dynamics=TrainingDynamics(N)).load_state_dict(state)


@pytest.mark.parametrize("own", [None, "digits"])
@pytest.mark.parametrize("saved", [None, "digits"])
def test_a_state_without_fingerprint_is_not_compared(own: str | None, saved: str | None) -> None:
    state = {**state_in_an_epoch(), "fingerprint": saved}
    TrainingProgress(MAKE["margins"](), fingerprint=own).load_state_dict(state)


def one_of(**arguments: Any) -> TrainingProgress:
    return TrainingProgress(**arguments)


WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: one_of(), TypeError, "dynamics: expected TrainingDynamics with sampler None"),
    (lambda: one_of(sampler=3), TypeError, "sampler: expected a MarginSampler, .*, got int"),
    (lambda: one_of(dynamics=3), TypeError, "dynamics: expected TrainingDynamics, got int"),
    (
        lambda: one_of(sampler=WeightedSampler(torch.ones(4))),
        TypeError,
        "dynamics: expected TrainingDynamics with sampler WeightedSampler, got None",
    ),
    (
        lambda: one_of(sampler=WeightedSampler(torch.ones(4)), dynamics=TrainingDynamics(5)),
        ValueError,
        "dynamics: expected 4 samples, .* got 5",
    ),
    (
        lambda: one_of(sampler=MAKE["margins"](), dynamics=TrainingDynamics(N)),
        ValueError,
        "dynamics: expected None or those of the sampler, got others",
    ),
    (lambda: one_of(dynamics=seen([1.0]), group=3), TypeError, "group: expected a torch.dist"),
    (lambda: one_of(dynamics=seen([1.0]), fingerprint=3), TypeError, "fingerprint: expected a str"),
    (lambda: one_of(dynamics=seen([1.0])).advance(-1), ValueError, "count: expected at least 0"),
    (lambda: one_of(dynamics=seen([1.0])).advance(1.5), TypeError, "count: expected an int, got f"),
    (lambda: one_of(dynamics=seen([1.0])).begin_epoch(-1), ValueError, "epoch: expected at least"),
    (
        lambda: one_of(sampler=MAKE["margins"]()).begin_epoch(-1),
        ValueError,
        "epoch: expected at le",
    ),
    (
        lambda: one_of(sampler=MAKE["margins"](num_replicas=2)).begin_epoch(0),
        ValueError,
        "sampler: expected num_replicas 1, because so many processes share an epoch, got 2",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_wrong_arguments(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
