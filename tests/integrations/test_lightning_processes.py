"""A training by Lightning on two ranks visits what one process visits, and resumes on either."""

from itertools import chain

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
from helpers import lightning_runs as runs
from helpers.ranks import ranks_fixture

GLOBAL_BATCH = 2 * runs.BATCH
STEPS = runs.VISITED // GLOBAL_BATCH  # of an epoch


ranks = ranks_fixture(2)


@pytest.fixture(scope="module")
def on_two(ranks, tmp_path_factory):
    def train(folder, checkpoint=None, **options):
        arguments = [(rank, str(folder), checkpoint, options) for rank in range(2)]
        return ranks.results(runs.train_on_rank, arguments, timeout=240)

    return train


@pytest.fixture(scope="module")
def whole(on_two, tmp_path_factory):
    """The folders and results of trainings that saved every step, on one rank and on two."""
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    saves = {"every_n_train_steps": 1}
    one = runs.train(folders[0], saves=saves, batch_size=GLOBAL_BATCH)
    return folders, [[one], on_two(folders[1], saves=saves)]


def steps(results):
    """The ids of each step on all ranks together."""
    visits = zip(*(result["seen"] for result in results), strict=True)
    return [sorted(chain(*(ids for _, ids in step))) for step in visits]


def test_two_ranks_visit_and_learn_what_one_process_does(whole):
    one, two = whole[1]
    assert steps(two) == steps(one)
    assert len(steps(one)) == 4 * STEPS
    for rank in two:
        for name in ("counts", "last_step", "weights"):
            assert torch.equal(rank["dynamics"][name], one[0]["dynamics"][name])
        for own, expected in zip(rank["parameters"], one[0]["parameters"], strict=True):
            torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("step", [1, STEPS, STEPS + 3])
def test_resumes_on_another_number_of_ranks(whole, on_two, tmp_path, step):
    (one_folder, two_folder), (one, two) = whole
    from_two = runs.train(tmp_path, f"{two_folder}/{step}.ckpt", batch_size=GLOBAL_BATCH)
    assert steps([from_two]) == steps(two)[step:]
    assert steps(on_two(tmp_path, f"{one_folder}/{step}.ckpt")) == steps(one)[step:]
    again = on_two(tmp_path, f"{two_folder}/{step}.ckpt")
    assert steps(again) == steps(two)[step:]
    for own, expected in zip(again[1]["parameters"], two[1]["parameters"], strict=True):
        assert torch.equal(own, expected)


def test_resumes_with_other_batches(whole, on_two, tmp_path):
    """The loop counts the batches that are left, and not those that the checkpoint counted."""
    (one_folder, two_folder), (one, two) = whole
    left = sorted(chain(*steps(two)[1:STEPS]))
    small = runs.train(tmp_path, f"{two_folder}/1.ckpt", max_epochs=1)
    assert sorted(chain(*steps([small]))) == left
    assert len(steps([small])) == len(left) // runs.BATCH
    left = sorted(chain(*steps(one)[STEPS - 1 : STEPS]))
    large = on_two(tmp_path, f"{one_folder}/{STEPS - 1}.ckpt", max_epochs=1, batch_size=1)
    assert sorted(chain(*steps(large))) == left
    assert len(steps(large)) == len(left) // 2


def test_fewer_batches_do_not_end_the_epoch_early(on_two, tmp_path):
    """An epoch has half as many batches on two ranks, and the checkpoint counted those of one."""
    saves = {"every_n_train_steps": 1}
    one = runs.train(tmp_path, saves=saves, max_epochs=1)
    rest = on_two(tmp_path, f"{tmp_path}/{STEPS - 2}.ckpt", max_epochs=1)
    assert sorted(chain(*steps(rest))) == sorted(chain(*steps([one])[STEPS - 2 :]))


def test_two_ranks_with_accumulation_and_half_precision(on_two, tmp_path):
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
    saves = {"every_n_train_steps": 1}
    results = on_two(tmp_path, saves=saves, **options)
    assert results[0]["steps"] == 4 * STEPS / 2
    resumed = on_two(tmp_path, f"{tmp_path}/3.ckpt", **options)
    assert steps(resumed) == steps(results)[6:]
    for own, expected in zip(resumed[0]["parameters"], results[1]["parameters"], strict=True):
        assert torch.equal(own, expected)
