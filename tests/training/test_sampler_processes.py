"""Samplers over processes: the epochs of one process, resumes on other numbers, errors on all."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import Ranks, ranks_fixture
from helpers.seen import see, seen
from marginops.training import MarginSampler, ReductionSampler, SmallestMargins, TrainingDynamics

N, GLOBAL_BATCH, EPOCHS = 75, 12, 6
KINDS = {
    "margins": (MarginSampler, {"seed": 4}),  # 30 samples an epoch
    "padding": (MarginSampler, {"num_samples": 31, "policy": SmallestMargins(by="aum")}),
    "subset": (MarginSampler, {"num_samples": 30, "subset": torch.arange(2, 75, 2)}),
    "reduction": (ReductionSampler, {"num_kept": 5, "num_samples": 30, "trigger": 0.5}),
}

SAMPLES = {"margins": 30, "padding": 31, "subset": 30, "reduction": 5}  # different ones an epoch


ranks = ranks_fixture(3)


def margin(sample: int, step: int) -> float:
    return (sample * 37 % 75) / 20 - 1.2 + step * 0.03 * (sample % 3)


def run(kind: str, state: Any, steps: int, group: Any) -> tuple[list[list[int]], Any]:
    """Train for some steps; returns the ids of this rank at each step, and the state."""
    make, options = KINDS[kind]
    sampler = make(TrainingDynamics(N), group=group, **options)
    dynamics = sampler.dynamics
    if state is not None:
        dynamics.load_state_dict(state[0])
        sampler.load_state_dict(state[1])
    visited: list[list[int]] = []
    epoch = sampler.epoch
    while epoch < EPOCHS:
        sampler.set_epoch(epoch)
        consumed = sampler.state_dict()["position"]
        iterator = iter(sampler)
        while True:
            if len(visited) == steps:
                if group is not None:
                    dynamics.sync(group)
                return visited, (dynamics.state_dict(), sampler.state_dict(position=consumed))
            batch = GLOBAL_BATCH // sampler.num_replicas
            ids = [sample for _, sample in zip(range(batch), iterator, strict=False)]
            if not ids:
                break
            step = dynamics.num_updates
            see(dynamics, ids, [margin(sample, step) for sample in ids])
            visited.append(ids)
            consumed += len(ids) * sampler.num_replicas
        epoch += 1
    if group is not None:
        dynamics.sync(group)
    return visited, (dynamics.state_dict(), sampler.state_dict())


def run_on_rank(groups: Any, arguments: Any) -> Any:
    kind, state, steps, group_index = arguments
    group = groups[group_index]
    if dist.get_rank(group) < 0:
        return [], None
    return run(kind, state, steps, group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_index", [0, 1], ids=["3 ranks", "2 ranks"])
def test_ranks_visit_what_one_process_visits(ranks: Ranks, kind: str, group_index: int) -> None:
    expected, final = run(kind, None, 10**6, None)
    answers = ranks.results(run_on_rank, [(kind, None, 10**6, group_index)] * 3)
    assert_same_visits(joined([ids for ids, _ in answers]), expected, kind)
    for ids, state in answers:
        if ids and kind != "reduction":  # which visits a sample on several ranks
            assert_same_state(state, final)
    assert len(expected) == EPOCHS * 3
    last_epoch = {sample for ids in expected[-3:] for sample in ids}
    assert len(last_epoch) == SAMPLES[kind]


def joined(visits: list[list[list[int]]]) -> list[list[int]]:
    """The ids of all ranks at each step."""
    members = [steps for steps in visits if steps]
    return [sorted(itertools.chain(*step)) for step in zip(*members, strict=True)]


def assert_same_visits(visited: list[list[int]], expected: list[list[int]], kind: str) -> None:
    unique = set if kind == "padding" else list  # padding repeats ids of the same step
    assert [sorted(unique(ids)) for ids in visited] == [sorted(ids) for ids in expected]


def assert_same_state(state: Any, expected: Any) -> None:
    for name, value in expected[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[0][name].nan_to_num(), value.nan_to_num()), name
        else:
            assert state[0][name] == value, name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stops", [(2, 7), (4, 5), (9, 13)], ids=str)
def test_a_run_goes_on_with_another_number_of_ranks(
    ranks: Ranks, kind: str, stops: tuple[int, int]
) -> None:
    """2 ranks, then 1 process, then 3 ranks; kills within an epoch and between two."""
    expected, final = run(kind, None, 10**6, None)
    first = ranks.results(run_on_rank, [(kind, None, stops[0], 1)] * 3)
    states = [state for ids, state in first if ids]
    assert states[0][1] == states[1][1], "the ranks saved different states"
    alone, state = run(kind, states[1], stops[1] - stops[0], None)
    last = ranks.results(run_on_rank, [(kind, state, 10**6, 0)] * 3)
    visited = joined([ids for ids, _ in first]) + [sorted(ids) for ids in alone]
    visited += joined([ids for ids, _ in last])
    assert_same_visits(visited, expected, kind)
    for _, state in last:
        if kind != "reduction":
            assert_same_state(state, final)


def begin(groups: Any, arguments: dict[str, Any]) -> Any:
    own = {"num_samples_of_data": N, "epoch": 0, **arguments}
    dynamics = seen([float(sample) for sample in range(own.pop("num_samples_of_data"))])
    epoch = own.pop("epoch")
    if stale := own.pop("stale", 0):
        weights = torch.arange(dynamics.num_samples).float() + stale
        dynamics.weights, dynamics.weights_version = weights, epoch
    sampler = MarginSampler(dynamics, group=groups[0], **own)
    sampler.set_epoch(epoch)
    return list(sampler)


def wrong_policy(dynamics: TrainingDynamics, k: int, labels: Any) -> torch.Tensor:
    if dist.get_rank() == 1:
        raise KeyError("no such file")
    return torch.ones(N)


def own_policy(dynamics: TrainingDynamics, k: int, labels: Any) -> torch.Tensor:
    return torch.ones(N) + dist.get_rank()


def own_zero_policy(dynamics: TrainingDynamics, k: int, labels: Any) -> torch.Tensor:
    weights = torch.ones(N)
    weights[dist.get_rank()] = 0
    return weights


DIFFERENCES = {
    "seed": ([{"seed": 1}, {"seed": 1}, {"seed": 2}], "seed: expected the same value on all ranks"),
    "size": ([{}, {"num_samples_of_data": 74, "num_samples": 30}, {}], "dynamics.num_samples: "),
    "length": ([{"policy": SmallestMargins(0.5)}, {}, {}], "num_samples: expected the same .* 38"),
    "subset": (
        [{"num_samples": 9, "subset": torch.arange(20) + place} for place in (0, 0, 1)],
        "checksum of the subset: expected the same value on all ranks",
    ),
    "epoch": ([{}, {}, {"epoch": 3}], "epoch: expected the same value on all ranks, got 0, 0, 3"),
    "ends": ([{"drop_last": True}, {}, {}], "drop_last: expected the same value"),
    "state": ([{"stale": 1}, {}, {}], "dynamics.weights_version: expected the same value"),
    "stale": (
        [{"stale": 1}, {"stale": 2}, {"stale": 1}],
        "checksum of the weights: expected the same value on all ranks",
    ),
    "weights": (
        [{"policy": own_zero_policy, "num_samples": 9}] * 3,
        "checksum of the weights: expected the same value on all ranks",
    ),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_between_ranks_is_an_error_on_all(ranks: Ranks, case: str) -> None:
    arguments, message = DIFFERENCES[case]
    answers = ranks(begin, arguments, timeout=60)
    for answer in answers:
        assert isinstance(answer, ValueError)
        with pytest.raises(ValueError, match=message):
            raise answer


def test_equal_weights_up_to_a_factor_are_equal(ranks: Ranks) -> None:
    answers = ranks.results(begin, [{"policy": own_policy, "num_samples": 9}] * 3)
    assert len(set(itertools.chain(*answers))) == 9


def test_an_error_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    answers = ranks(begin, [{"policy": wrong_policy, "num_samples": 9}] * 3, timeout=60)
    assert [type(answer) for answer in answers] == [RuntimeError, KeyError, RuntimeError]
    assert str(answers[0]) == "rank 1 failed: KeyError: 'no such file'"


def test_a_wrong_epoch_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    answers = ranks(begin, [{}, {"epoch": -1}, {}], timeout=60)
    assert [type(answer) for answer in answers] == [RuntimeError, ValueError, RuntimeError]
    assert str(answers[2]) == "rank 1 failed: ValueError: epoch: expected at least 0, got -1"
