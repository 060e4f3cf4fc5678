"""TrainingProgress on ranks."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.dynamics_batches import assert_same_dynamics
from helpers.progress_runs import MAKE, SIZES, N, run, through_a_file
from helpers.ranks import Ranks, ranks_fixture
from marginops.training import (
    MarginSampler,
    SmallestMargins,
    TrainingDynamics,
    TrainingProgress,
    WeightedSampler,
)

ranks = ranks_fixture(3)


def progress_on_rank(kind: str, way: str, group: Any) -> tuple[TrainingProgress, Any]:
    """A progress whose epochs are divided by the sampler or by a loader."""
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    if way == "group":
        return TrainingProgress(MAKE[kind](group=group)), (0, 1)
    if way == "replicas":
        sampler = MAKE[kind](num_replicas=count, rank=rank)
        return TrainingProgress(sampler, group=group), (0, 1)
    return TrainingProgress(MAKE[kind](), group=group), (rank, count)


def run_on_rank(groups: Any, arguments: Any) -> Any:
    kind, way, state, last, number = arguments
    group = groups[number]
    if dist.get_rank(group) < 0:
        return [], None, 0
    progress, divided = progress_on_rank(kind, way, group)
    if state is not None:
        progress.load_state_dict(state)
    with pytest.MonkeyPatch.context() as patch:
        syncs = []
        original = TrainingDynamics.sync
        patch.setattr(
            TrainingDynamics, "sync", lambda self, group: (syncs.append(1), original(self, group))
        )
        visited = run(progress, last, divided)
    state = progress.state_dict()
    # At the end of an epoch a loader may leave a rank without samples.
    assert progress.position == state["position"] or way == "loader"
    return visited, state, len(syncs)


def joined(answers: list[Any]) -> list[list[int]]:
    """The ids of all ranks at each step."""
    steps = zip(*(ids for ids, state, _ in answers if state), strict=True)
    return [sorted(itertools.chain(*step)) for step in steps]


WAYS = ["group", "replicas", "loader"]


@pytest.mark.parametrize("kind", ["margins", "padding"])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_go_on_as_one_process_would(ranks: Ranks, kind: str, way: str) -> None:
    """2 ranks, then 1 process, then 3 ranks; each state is the same on all ranks."""
    whole = TrainingProgress(MAKE[kind]())
    expected = run(whole)
    first = ranks.results(run_on_rank, [(kind, way, None, 4, 1)] * 3)
    states = [state for _, state, _ in first if state]
    assert states[0]["position"] == states[1]["position"] == 12
    assert states[0]["sampler"] == states[1]["sampler"]
    alone = TrainingProgress(MAKE[kind]())
    alone.load_state_dict(through_a_file(states[1]))
    middle = run(alone, 8)
    last = ranks.results(run_on_rank, [(kind, way, alone.state_dict(), 10**6, 0)] * 3)
    visited = joined(first) + [sorted(ids) for ids in middle] + joined(last)
    # Padding repeats ids of the same step.
    assert [sorted(set(ids)) for ids in visited] == [sorted(ids) for ids in expected]
    for _, state, syncs in last:
        final = TrainingProgress(MAKE[kind]())
        final.load_state_dict(state)
        assert_same_dynamics(final.dynamics, whole.dynamics)
        assert (state["epoch"], state["position"]) == (5, SIZES[kind][0])
        assert syncs == 3  # in the epochs 3, 4 and 5; epoch 2 has its weights already


def consume_unevenly(groups: Any, counts: list[int]) -> Any:
    progress = TrainingProgress(MAKE["margins"](), group=groups[0])
    progress.begin_epoch(0)
    progress.advance(counts[dist.get_rank()])
    return progress.state_dict()["position"]


def test_ranks_that_consumed_different_numbers_are_an_error_on_all(ranks: Ranks) -> None:
    for answer in ranks(consume_unevenly, [[4, 4, 12]] * 3):
        with pytest.raises(
            ValueError, match=r"position: expected the same .*, got 4, 4, 12 on the"
        ):
            raise answer
    assert ranks.results(consume_unevenly, [[12, 12, 6]] * 3) == [30] * 3  # the end of the epoch


def begin(groups: Any, arguments: dict[str, Any]) -> None:
    epoch, kind, ahead = arguments["epoch"], arguments["kind"], arguments.get("ahead", 0)
    sampler = {
        "margins": lambda: MAKE["margins"](),
        "seed": lambda: MarginSampler(TrainingDynamics(N), seed=dist.get_rank()),
        "half": lambda: MarginSampler(TrainingDynamics(N), SmallestMargins(0.5)),
        "none": lambda: None,
        "weighted": lambda: WeightedSampler(torch.arange(9.0) + dist.get_rank(), 5),
        "replicas": lambda: MAKE["margins"](num_replicas=2),
    }[kind]()
    dynamics = None if isinstance(sampler, MarginSampler) else TrainingDynamics(9)
    progress = TrainingProgress(sampler, dynamics=dynamics, group=groups[0])
    progress.epoch += ahead
    progress.begin_epoch(epoch)


DIFFERENCES = [
    ([{"epoch": 0, "kind": "seed"}] * 3, "seed: expected the same value on all ranks"),
    ([{"epoch": rank, "kind": "margins"} for rank in range(3)], "epoch: expected the same value"),
    ([{"epoch": rank, "kind": "none"} for rank in range(3)], "epoch: expected the same value"),
    ([{"epoch": 0, "kind": "weighted"}] * 3, "weights_version: expected the same value"),
    ([{"epoch": 0, "kind": "replicas"}] * 3, "num_replicas 1 or 3, because so many .*, got 2"),
    (
        [{"epoch": 0, "kind": kind} for kind in ("margins", "half", "margins")],
        "num_samples: expected the same value on all ranks, got 30, 38, 30",
    ),
    (
        [{"epoch": 4, "kind": "none", "ahead": rank} for rank in range(3)],
        "current epoch: expected the same value on all ranks, got 0, 1, 2",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), DIFFERENCES)
def test_a_difference_between_ranks_is_an_error_on_all(
    ranks: Ranks, arguments: Any, message: str
) -> None:
    for answer in ranks(begin, arguments):
        assert isinstance(answer, ValueError), answer
        with pytest.raises(ValueError, match=message):
            raise answer
    ranks.results(begin, [{"epoch": 1, "kind": "margins"}] * 3)


def test_an_error_on_one_rank_is_an_error_on_all(ranks: Ranks) -> None:
    arguments = [{"epoch": epoch, "kind": "none"} for epoch in (0, -1, 0)]
    answers = ranks(begin, arguments)
    assert [type(answer) for answer in answers] == [RuntimeError, ValueError, RuntimeError]
    assert str(answers[2]) == "rank 1 failed: ValueError: epoch: expected at least 0, got -1"


def other_group(groups: Any, _: Any) -> None:
    TrainingProgress(MAKE["margins"](group=groups[0]), group=dist.new_group([0, 1, 2]))


def test_two_groups_are_an_error(ranks: Ranks) -> None:
    for answer in ranks(other_group, [None] * 3):
        with pytest.raises(ValueError, match="group: expected None or the group of the sampler"):
            raise answer
