"""TrainingProgress: positions, states, and what does not fit; in one process and on ranks."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.dynamics_batches import assert_same_dynamics
from helpers.ranks import Ranks
from helpers.seen import seen
from marginops.training import (
    MarginSampler,
    ReductionSampler,
    SmallestMargins,
    TrainingDynamics,
    TrainingProgress,
    WeightedSampler,
)

N, GLOBAL_BATCH, EPOCHS = 75, 12, 6
MAKE: dict[str, Callable[..., Any]] = {
    "margins": lambda **ranks: MarginSampler(TrainingDynamics(N), seed=4, **ranks),
    "padding": lambda **ranks: MarginSampler(TrainingDynamics(N), num_samples=31, **ranks),
    "shrink": lambda **ranks: ReductionSampler(
        TrainingDynamics(N), 14, trigger=0.5, factor=0.4, shrink=True, **ranks
    ),
}
SIZES = {"margins": [30] * 6, "padding": [31] * 6, "shrink": [75, 30, 14, 14, 14, 14]}
FIRST_STEPS = {"margins": 3, "padding": 3, "shrink": 7}  # the steps of the first epoch


def logits_of(ids: list[int], step: int) -> tuple[torch.Tensor, ...]:
    indices = torch.tensor(ids, dtype=torch.int64)
    margin = (indices * 37 % N) / 20 - 1.2 + step * 0.03 * (indices % 3)
    return indices, torch.stack([margin, torch.zeros(len(ids))], 1), torch.zeros_like(indices)


def run(
    progress: TrainingProgress, last: int = 10**6, divided: tuple[int, int] = (0, 1)
) -> list[list[int]]:
    """Train until ``last`` steps are done; returns the ids of this rank at each step.

    With ``divided``, (rank, count), a loader gives each rank some of the batches.
    """
    sampler, visited = progress.sampler, []
    rank, count = divided
    for epoch in range(progress.next_epoch, EPOCHS):
        progress.begin_epoch(epoch)
        batches = sampler.indices().split(GLOBAL_BATCH // (count * sampler.num_replicas))
        for own in range(0, len(batches), count):
            step = progress.dynamics.num_updates
            if step == last:
                return visited
            ids = batches[own + rank].tolist() if own + rank < len(batches) else []
            progress.update(*logits_of(ids, step))
            visited.append(ids)
    return visited


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", MAKE)
def test_a_run_goes_on_after_any_step(kind: str) -> None:
    whole = TrainingProgress(MAKE[kind]())
    visited = run(whole)
    for step in range(len(visited) + 1):
        first = TrainingProgress(MAKE[kind]())
        begin = run(first, step)
        resumed = TrainingProgress(MAKE[kind]())
        resumed.load_state_dict(through_a_file(first.state_dict()))
        assert (resumed.epoch, resumed.position) == (first.epoch, first.position)
        assert begin + run(resumed) == visited
        assert_same_dynamics(resumed.dynamics, whole.dynamics)
    assert sum(map(len, visited)) == sum(SIZES[kind])


@pytest.mark.parametrize("kind", MAKE)
def test_the_position_counts_this_epoch(kind: str) -> None:
    progress = TrainingProgress(MAKE[kind]())
    assert (progress.epoch, progress.position, progress.next_epoch) == (0, 0, 0)
    run(progress, 1)
    assert (progress.epoch, progress.position, progress.next_epoch) == (0, 12, 0)
    run(progress, FIRST_STEPS[kind])
    progress = TrainingProgress(MAKE[kind]())
    run(progress)
    last = SIZES[kind][-1]
    assert (progress.epoch, progress.position, progress.next_epoch) == (5, last, 6)
    progress.begin_epoch(5)  # another training begins with this epoch
    assert (progress.position, progress.next_epoch) == (0, 5)


def test_the_end_of_an_epoch_is_a_state_of_its_own() -> None:
    progress = TrainingProgress(MAKE["margins"]())
    run(progress, 3)
    state = progress.state_dict()
    # begin_epoch(1) was called by the loop; the state before it is that of the whole epoch 0.
    assert (state["epoch"], state["position"]) == (1, 0)
    progress = TrainingProgress(MAKE["margins"]())
    progress.begin_epoch(0)
    for ids in progress.sampler.indices().split(12):
        progress.update(*logits_of(ids.tolist(), 0))
    state = progress.state_dict()
    assert (state["epoch"], state["position"]) == (0, 30)
    resumed = TrainingProgress(MAKE["margins"]())
    resumed.load_state_dict(state)
    assert resumed.next_epoch == 1
    resumed.begin_epoch(0)  # a host may go on with the old epoch: nothing is left of it
    assert list(resumed.sampler) == [] and resumed.position == 30
    resumed.begin_epoch(1)
    progress.begin_epoch(1)
    assert list(resumed.sampler) == list(progress.sampler) and resumed.position == 0


def test_what_the_loader_delivers_counts_and_padding_does_not() -> None:
    progress = TrainingProgress(MAKE["margins"]())
    progress.begin_epoch(0)
    ids = progress.sampler.indices()
    progress.advance(12)  # 5 of them were trained on
    progress.dynamics.update(*logits_of(ids[:5].tolist(), 0))
    assert progress.state_dict()["position"] == progress.position == 12
    progress.advance(100)  # the last samples come with padding
    assert progress.state_dict()["position"] == progress.position == 30
    progress.advance(0)
    for call in (lambda: progress.advance(1), lambda: progress.update(*logits_of([1], 0))):
        with pytest.raises(ValueError, match="position: expected at most 30 samples in epoch 0"):
            call()
    assert progress.dynamics.num_updates == 1


def test_a_training_without_a_sampler_of_ours() -> None:
    progress = TrainingProgress(dynamics=TrainingDynamics(10))
    progress.begin_epoch(2)
    progress.update(*logits_of([1, 2, 3], 0))
    state = progress.state_dict()
    assert (state["epoch"], state["position"], state["sampler"]) == (2, 3, None)
    resumed = TrainingProgress(dynamics=TrainingDynamics(10))
    resumed.load_state_dict(state)
    resumed.begin_epoch(2)
    assert resumed.position == 3 and resumed.next_epoch == 2
    resumed.advance(7)
    assert resumed.position == 10 and resumed.next_epoch == 3
    resumed.begin_epoch(3)
    assert resumed.position == 0


def test_weights_of_ones_own_with_dynamics() -> None:
    def make() -> TrainingProgress:
        sampler = WeightedSampler(torch.arange(10.0), num_samples=6, seed=3)
        return TrainingProgress(sampler, dynamics=TrainingDynamics(10))

    whole, first, resumed = make(), make(), make()
    for progress in (whole, first):
        progress.begin_epoch(1)
        progress.update(*logits_of(progress.sampler.indices()[:4].tolist(), 0))
    expected = list(whole.sampler)
    resumed.load_state_dict(first.state_dict())
    resumed.begin_epoch(1)
    assert list(resumed.sampler) == expected[4:]
    for epoch in (0, 1):  # as a host does that counts the epochs through
        resumed.sampler.set_epoch(epoch)
    with pytest.raises(ValueError, match="in epoch 1 from position 4 on, got epoch 1 and position"):
        resumed.advance(1)


def test_an_epoch_that_somebody_else_sets_is_an_error_before_anything_is_noted() -> None:
    progress = TrainingProgress(MAKE["margins"]())
    progress.begin_epoch(0)
    progress.sampler.set_epoch(3)
    for call in (
        lambda: progress.update(*logits_of([1], 0)),
        lambda: progress.advance(1),
        progress.state_dict,
    ):
        with pytest.raises(
            ValueError,
            match="epoch: expected the sampler in epoch 0 from position 0 on, got epoch 3 and",
        ):
            call()
    assert progress.dynamics.num_updates == 0
    progress.begin_epoch(3)
    progress.update(*logits_of([1], 0))


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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    seen([0.0])  # this process compiles the kernels first, so that no rank waits for another
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        processes = Ranks(3, str(tmp_path_factory.mktemp("ranks") / "store"))
    yield processes
    processes.close()


def on_all(ranks: Ranks, function: Any, arguments: Any) -> list[Any]:
    answers = ranks(function, arguments)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


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
    first = on_all(ranks, run_on_rank, [(kind, way, None, 4, 1)] * 3)
    states = [state for _, state, _ in first if state]
    assert states[0]["position"] == states[1]["position"] == 12
    assert states[0]["sampler"] == states[1]["sampler"]
    alone = TrainingProgress(MAKE[kind]())
    alone.load_state_dict(through_a_file(states[1]))
    middle = run(alone, 8)
    last = on_all(ranks, run_on_rank, [(kind, way, alone.state_dict(), 10**6, 0)] * 3)
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
    assert on_all(ranks, consume_unevenly, [[12, 12, 6]] * 3) == [30] * 3  # the end of the epoch


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
    on_all(ranks, begin, [{"epoch": 1, "kind": "margins"}] * 3)


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
