"""MarginCallback writes the folder of a run, and goes on with it."""

import json

import pytest

import marginops.training as training

pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
from helpers import lightning_runs as runs
from marginops.integrations.lightning import MarginCallback


class Logs(runs.Model):
    """Logs numbers within the epoch and at its end."""

    def training_step(self, batch):
        results = super().training_step(batch)
        self.log("loss_of_epoch", results["loss"], on_step=False, on_epoch=True)
        self.log("epoch", 3.0)
        return results

    def on_train_epoch_end(self):
        self.log("tens", 10.0 * self.trainer.current_epoch)


def run(folder, checkpoint=None):
    """The lines of the epochs that a training writes."""
    sampler = runs.make_sampler()
    callback = MarginCallback(sampler, recorder=training.RunRecorder(folder, sampler.dynamics))
    saves = [] if checkpoint else [runs.checkpoints(folder.parent, every_n_train_steps=1)]
    trainer = runs.trainer(folder.parent, callback, *saves)
    runs.fit(trainer, Logs(), runs.make_loader(sampler), ckpt_path=checkpoint)
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def seen(lines):
    return [{key: line[key] for key in line.keys() - {"time", "values"}} for line in lines]


def test_folder_has_all_epochs_also_of_a_resumed_training(tmp_path):
    whole = run(tmp_path / "whole")
    assert [line["epoch"] for line in whole] == [0, 1, 2, 3]
    assert [line["values"]["tens"] for line in whole] == [0, 10, 20, 30]
    assert all(line["values"]["logged_epoch"] == 3 for line in whole)
    assert len({line["values"]["loss_of_epoch"] for line in whole}) == 4
    for step in (5, 8, 11):  # step 8 is the last one of an epoch
        resumed = run(tmp_path / str(step), f"{tmp_path}/{step}.ckpt")
        assert seen(resumed) == seen(whole)
        assert [line["values"] for line in resumed[2:]] == [line["values"] for line in whole[2:]]
