"""TrainingDynamics of several processes are, after a sync, those of one process."""

import pytest
import torch
import torch.distributed as dist

from helpers.dynamics_batches import assert_same_dynamics, batches
from helpers.ranks import ranks_fixture
from marginops.training import TrainingDynamics
from marginops.training.dynamics import merge as merging

SAMPLES, EPOCHS = 50, 3


ranks = ranks_fixture(2, 3)


def train(groups, arguments):
    """Train on the own share of every batch and sync after every epoch."""
    epochs, chunk, rank, count = arguments
    dynamics = TrainingDynamics(SAMPLES, decay=0.7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_CHUNK", chunk)
        for epoch in epochs:
            for indices, logits, target in epoch:
                own = owner(indices, count) == rank
                dynamics.update(indices[own], logits[own], target[own])
            dynamics.sync(groups[0])
        dynamics.sync()
    return dynamics


def owner(indices, count):
    """The rank that sees a sample; those of a batch are on several ranks."""
    return indices // 7 % count


@pytest.mark.parametrize("chunk", [2**20, 16])
def test_ranks_give_the_state_of_one_process(ranks, chunk):
    epochs = [batches(SAMPLES, 6, 12, seed) for seed in range(EPOCHS)]
    alone = TrainingDynamics(SAMPLES, decay=0.7)
    for epoch in epochs:
        for batch in epoch:
            alone.update(*batch)
    arguments = [(epochs, chunk, rank, ranks.count) for rank in range(ranks.count)]
    for answer in ranks.results(train, arguments):
        assert_same_dynamics(answer, alone)
    assert alone.num_nonfinite > 0


def newest(groups, updates):
    dynamics = TrainingDynamics(SAMPLES)
    for update in updates:
        dynamics.update(*update)
    dynamics.sync()
    return dynamics


def test_the_newest_record_wins_and_the_lowest_rank_among_equals(ranks):
    def update(index, margin):
        return torch.tensor([index]), torch.tensor([[margin, 0.0]]), torch.tensor([0])

    nobody = torch.tensor([], dtype=torch.int64), torch.zeros(0, 2), torch.tensor([]).long()
    updates = [
        [update(0, 1.0 + rank), update(1, 1.0 + rank), nobody, update(4, 1.0 + rank)]
        for rank in range(ranks.count)
    ]
    updates[-1][:3] = [update(1, 2.0), update(2, 2.0), update(0, 3.0)]
    for dynamics in ranks.results(newest, updates):
        assert dynamics.margin[:3].tolist() == [3.0, 1.0, 2.0]
        assert dynamics.last_step[:4].tolist() == [2, 1, 1, -1]
        assert dynamics.margin[4] == 1.0 and dynamics.last_step[4] == 3  # of rank 0
        assert dynamics.num_updates == 4


def calls_of_a_sync(groups, samples):
    dynamics, names = TrainingDynamics(samples), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_object"):
            original = getattr(dist, name)

            def spy(*arguments, original=original, name=name, **options):
                names.append(name)
                return original(*arguments, **options)

            patch.setattr(dist, name, spy)
        dynamics.sync()
    return names


def test_a_sync_takes_three_collectives(ranks):
    for names in ranks.results(calls_of_a_sync, [1000] * ranks.count):
        assert names == ["all_gather_object", "all_reduce", "all_reduce"]


def sync_with(groups, arguments):
    options, attributes = arguments
    dynamics = TrainingDynamics(**{"num_samples": 5, **options})
    for name, value in attributes.items():
        setattr(dynamics, name, value)
    try:
        dynamics.sync(groups[0])
    finally:
        groups[0].barrier()  # all ranks are here, so none hangs
    return dynamics


@pytest.mark.parametrize(
    ("options", "attributes", "message"),
    [
        ({"num_samples": 6}, {}, "num_samples: expected the same on every rank of group, got .*6"),
        ({"decay": 0.25}, {}, "decay: expected the same on every rank of group, got .*0.25"),
        ({}, {"weights_version": 3}, "weights_version: expected the same on every rank"),
        ({}, {"_common_nonfinite": 3}, "group: expected ranks that all took part in the last sync"),
    ],
)
def test_a_rank_with_other_arguments_is_an_error_on_every_rank(ranks, options, attributes, message):
    arguments = [({}, {})] * (ranks.count - 1) + [(options, attributes)]
    for answer in ranks(sync_with, arguments):
        assert isinstance(answer, ValueError), answer
        with pytest.raises(ValueError, match=message):
            raise answer
    ranks.results(sync_with, [({}, {})] * ranks.count)


def sync_in_a_group(groups, margin):
    dynamics = TrainingDynamics(3)
    if margin is not None:
        logits = torch.tensor([[margin, 0.0]])
        dynamics.update(torch.tensor([0]), logits, torch.tensor([0]))
    dynamics.sync(groups[1])
    return dynamics


def test_a_rank_outside_the_group_is_told(ranks):
    if ranks.count == 2:
        pytest.skip("the second group has all ranks")
    first, outside, last = ranks(sync_in_a_group, [None, None, 4.0])
    assert first.margin[0] == last.margin[0] == 4
    with pytest.raises(ValueError, match="group: expected a group that this process is a member"):
        raise outside


def test_one_process_has_nothing_to_sync():
    dynamics = TrainingDynamics(3)
    dynamics.sync()
    with pytest.raises(TypeError, match=r"group: expected a torch.distributed.ProcessGroup, got i"):
        dynamics.sync(3)
