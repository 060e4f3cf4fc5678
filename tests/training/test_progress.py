"""TrainingProgress: positions, and runs that go on after any step, in one process."""

import pytest
import torch

from helpers.dynamics_batches import assert_same_dynamics
from helpers.progress_runs import FIRST_STEPS, MAKE, SIZES, logits_of, run, through_a_file
from marginops.training import (
    TrainingDynamics,
    TrainingProgress,
    WeightedSampler,
)


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
