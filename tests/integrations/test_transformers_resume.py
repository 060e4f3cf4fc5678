"""A training with MarginTrainer goes on as if nothing had happened, also on other processes."""

import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers is not installed")

from transformers import Trainer

from helpers.ranks import ranks_fixture
from helpers.trainers import (
    SAMPLES,
    Watched,
    arguments,
    joined,
    make,
    mean_loss,
    network,
    parameters,
    run,
    run_rank,
    sampler,
    texts,
)
from marginops.training import MarginSampler, TrainingDynamics, WeightedSampler

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}


def assert_same_state(left, right, **tolerance):
    """Whether two runs end with the same parameters and dynamics."""
    for part in ("parameters", "dynamics"):
        assert left[part].keys() == right[part].keys()
        for name, value in left[part].items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, right[part][name], equal_nan=True, **tolerance)
            else:
                assert value == right[part][name]
    for part in ("steps", "epoch", "position"):
        assert left[part] == right[part]


# Of 24 samples in batches of 10, a step has 10, 10 and 4; with accumulation 20 and 4.
KINDS = {
    "sampler": ({}, 4),
    "recording": ({"share": None}, 8),
    "selection": ({"trainer_options": {"select": 3}}, 4),
    "accumulation": ({"gradient_accumulation_steps": 2}, 3),
    "end_of_epoch": ({}, 3),
    "workers": ({"dataloader_num_workers": 1}, 4),
    "adamw_bf16": ({"bf16": True, "optim": "adamw_torch", "lr_scheduler_type": "linear"}, 5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_uninterrupted(tmp_path, kind):
    options, stop = KINDS[kind]
    options = {**EVERY_STEP, **options, "dropout": 0.1}
    whole = run(tmp_path / "whole", **options)
    first = run(tmp_path / "killed", stop=stop, **options)
    accumulation = options.get("gradient_accumulation_steps", 1)
    rest = run(
        tmp_path / "resumed", checkpoint=str(tmp_path / f"killed/checkpoint-{stop}"), **options
    )
    assert first["visited"] + rest["visited"] == whole["visited"]
    assert 0 < len(rest["visited"]) < len(whole["visited"])
    assert len(first["visited"]) <= stop * accumulation
    assert_same_state(rest, whole, rtol=0, atol=0)


def test_the_last_checkpoint_of_a_folder_is_found(tmp_path):
    options = {**EVERY_STEP, "save_total_limit": 2}
    whole = run(tmp_path / "whole", **options)
    run(tmp_path / "killed", stop=7, **options)
    assert len([*(tmp_path / "killed").glob("checkpoint-*/marginops.pt")]) == 2
    rest = run(tmp_path / "killed", checkpoint=True, **options)
    assert rest["visited"] == whole["visited"][7:]
    assert_same_state(rest, whole, rtol=0, atol=0)


def test_other_batches_of_the_same_size_go_on(tmp_path):
    """Two batches of 10 a step, or four of 5."""
    wide = {**EVERY_STEP, "gradient_accumulation_steps": 2, "share": 2 / 3}
    narrow = {**wide, "gradient_accumulation_steps": 4, "per_device_train_batch_size": 5}
    whole = run(tmp_path / "whole", **wide)
    run(tmp_path / "killed", stop=3, **wide)
    rest = run(tmp_path / "rest", checkpoint=str(tmp_path / "killed/checkpoint-3"), **narrow)
    assert joined(rest["visited"]) == joined(whole["visited"][6:])


ranks = ranks_fixture(2)


def run_ranks(ranks, folder, **options):
    return ranks.results(run_rank, [{"folder": str(folder), **options}] * 2, timeout=240)


def steps(*processes):
    """The samples of each step, over all processes."""
    return [
        sorted(joined(parts))
        for parts in zip(*(each["visited"] for each in processes), strict=True)
    ]


def test_ranks_share_an_epoch_equally(ranks, tmp_path):
    options = {"num_train_epochs": 3, "share": 0.35}
    alone = run(tmp_path / "alone", **options)
    both = run_ranks(ranks, tmp_path / "both", per_device_train_batch_size=5, **options)
    assert [len(rows) for rows in both[0]["visited"]] == [5, 5, 1] * 3
    assert [len(rows) for rows in both[1]["visited"]] == [5, 5, 1] * 3
    # 21 samples: the last one is on both ranks.
    for together, rows in zip(steps(*both), steps(alone), strict=True):
        assert sorted({*together}) == rows
    for each in both:
        assert_same_state(each, alone)


@pytest.mark.parametrize("options", [{"select": 2}, {}], ids=["selection", "recording"])
def test_ranks_train_alike(ranks, tmp_path, options):
    share = 0.4 if options else None
    left, right = run_ranks(ranks, tmp_path, share=share, trainer_options=options)
    assert_same_state(left, right, rtol=0, atol=0)
    assert all(len(rows) == options.get("select", 10) for rows in left["visited"])
    assert not {*joined(left["visited"][:1])} & {*joined(right["visited"][:1])}
    if not options:
        assert sorted(joined(left["visited"][:3] + right["visited"][:3])) == [*range(SAMPLES)]


def test_a_training_moves_from_one_process_to_two_and_back(ranks, tmp_path):
    two = {**EVERY_STEP, "per_device_train_batch_size": 5}
    whole = run(tmp_path / "whole", **EVERY_STEP)
    first = run(tmp_path / "first", stop=4, **EVERY_STEP)
    checkpoint = str(tmp_path / "first/checkpoint-4")
    second = run_ranks(ranks, tmp_path / "second", checkpoint=checkpoint, stop=5, **two)
    checkpoint = str(tmp_path / "second/checkpoint-5")
    third = run(tmp_path / "third", checkpoint=checkpoint, **EVERY_STEP)
    assert steps(first) + steps(*second) + steps(third) == steps(whole)
    assert_same_state(third, whole)


def resume(folder, checkpoint, **options):
    return run(folder / "resumed", checkpoint=str(folder / checkpoint), **{**EVERY_STEP, **options})


def test_another_size_of_a_step_is_refused(tmp_path):
    run(tmp_path / "killed", stop=2, **EVERY_STEP)
    with pytest.raises(ValueError, match=r"expected step 2 at sample 20 of epoch 0, got sample 10"):
        resume(tmp_path, "killed/checkpoint-2", per_device_train_batch_size=5)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    run(tmp_path / "killed", stop=2, **EVERY_STEP)
    dynamics = TrainingDynamics(40)
    dynamics.update(torch.tensor([3]), torch.zeros(1, 2), torch.tensor([0]))
    before = dynamics.state_dict()
    trainer = make(
        Watched,
        network(),
        arguments(tmp_path / "other", **EVERY_STEP),
        train_dataset=texts(40),
        sampler=MarginSampler(dynamics, num_samples=24),
    )
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*expected .*40.*, got 60"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "killed/checkpoint-2"))
    after = dynamics.state_dict()
    assert all(
        torch.equal(value.nan_to_num(7), after[name].nan_to_num(7))
        for name, value in before.items()
        if isinstance(value, torch.Tensor)
    )
    with pytest.raises(ValueError, match=r"with sampler=, and this training is without it"):
        resume(tmp_path, "killed/checkpoint-2", share=None)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*position|weights"):
        resume(tmp_path, "killed/checkpoint-2", share=0.2)


def test_a_checkpoint_of_other_data_of_the_same_size_is_refused(tmp_path):
    def go_on(data, **options):
        order = sampler()
        trainer = make(
            Watched,
            network(),
            arguments(tmp_path / "other", **EVERY_STEP),
            **{"train_dataset": data, "sampler": order, "compute_loss_func": mean_loss, **options},
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "killed/checkpoint-2"))
        return trainer

    run(tmp_path / "killed", stop=2, **EVERY_STEP)
    with pytest.raises(
        ValueError, match=r"expected the fingerprint '32 labels \w{8}' of this"
    ) as e:
        go_on(texts(seed=1))
    of_checkpoint = re.search(r"got '(32 labels \w{8})'", str(e.value)).group(1)
    assert go_on(texts(seed=1), fingerprint=of_checkpoint).state.global_step == 9
    with pytest.raises(ValueError, match=r"expected the fingerprint 'texts of today'"):
        go_on(texts(), fingerprint="texts of today")
    assert go_on(texts()).state.global_step == 9


class Noisy(torch.utils.data.Dataset):
    """Texts with a word and a label that are drawn anew at each reading, all by other packages."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        words = [random.randrange(40), int(np.random.randint(40)), int(torch.randint(40, ()))]
        return {"input_ids": words, "labels": sum(words) % 3}


def test_what_is_drawn_at_random_neither_changes_nor_stops_a_training(tmp_path):
    def train(host, folder, **options):
        made = make(host, network(), arguments(tmp_path / folder, **EVERY_STEP), None, Noisy())
        if options:  # other random numbers than those of a new trainer
            random.random(), np.random.rand(), torch.rand(1)
        made.train(**options)
        return made

    plain, ours = train(Trainer, "plain"), train(Watched, "ours")
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(ours)[name], value, rtol=0, atol=0)
    checkpoint = str(tmp_path / "ours/checkpoint-4")
    assert train(Watched, "rest", resume_from_checkpoint=checkpoint).state.global_step == 18


def test_a_training_without_checkpoint_begins_at_the_first_sample(tmp_path):
    order = WeightedSampler(torch.ones(SAMPLES))
    trainer = make(
        Watched,
        network(),
        arguments(tmp_path, **{**EVERY_STEP, "num_train_epochs": 1}),
        **{"train_dataset": texts(), "sampler": order},
    )
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(trainer.visited) == 6 + 2
    trainer.train()
    assert trainer.visited[8:] == trainer.visited[:6]


def test_a_checkpoint_without_our_state_is_refused(tmp_path):
    run(tmp_path / "killed", stop=2, **EVERY_STEP)
    state = tmp_path / "killed/checkpoint-2/marginops.pt"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected the state"):
        resume(tmp_path, "killed/checkpoint-2")
    state.unlink()
    with pytest.raises(FileNotFoundError, match=r"a checkpoint with the file marginops\.pt"):
        resume(tmp_path, "killed/checkpoint-2")


def test_every_checkpoint_of_the_host_has_our_state(tmp_path):
    """Our file is there before those that make a checkpoint loadable."""
    trainer = make(
        Watched,
        network(),
        arguments(tmp_path, **EVERY_STEP),
        train_dataset=texts(),
        sampler=sampler(),
    )
    seen = []
    trainer.save_model = lambda folder, **_: seen.append(
        torch.load(f"{folder}/marginops.pt", weights_only=True)["position"]
    )
    trainer.train()
    assert seen == [10, 20, 24] * 3
