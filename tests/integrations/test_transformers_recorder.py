"""MarginTrainer writes the folder of a run, and goes on with it."""

import json

import pytest

import marginops.training as training

pytest.importorskip("transformers", reason="the extra transformers is not installed")

from helpers.trainers import Stop, arguments, make, network, sampler, texts
from marginops.integrations.transformers import MarginTrainer


def run(folder, where, checkpoint=None, stop=None):
    """The epochs that a training writes, without their times."""
    order = sampler()
    recorder = training.RunRecorder(folder, order.dynamics, resume=checkpoint is not None)
    trainer = make(
        MarginTrainer,
        network(),
        arguments(where, save_strategy="steps", save_steps=1, num_train_epochs=3),
        train_dataset=texts(),
        sampler=order,
        recorder=recorder,
        callbacks=[] if stop is None else [Stop(stop)],
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        assert stop is not None
    lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


@pytest.mark.parametrize("stop", [4, 6], ids=["within_an_epoch", "at_its_end"])
def test_every_epoch_is_written_once(tmp_path, stop):
    whole = run(tmp_path / "whole", tmp_path / "checkpoints")
    assert [line["epoch"] for line in whole] == [0, 1, 2]
    run(tmp_path / "killed", tmp_path / "other", stop=stop)
    checkpoint = str(tmp_path / f"other/checkpoint-{stop}")
    assert run(tmp_path / "killed", tmp_path / "rest", checkpoint) == whole
