"""MarginTrainer says what is wrong with its arguments, its data and its host."""

import subprocess
import sys
import types
import warnings

import pytest
import torch

pytest.importorskip("transformers", reason="the extra transformers is not installed")

from transformers import Trainer, TrainerCallback

from helpers.trainers import SAMPLES, arguments, make, network, sampler, texts
from marginops.integrations._arguments import warn_of_waiting
from marginops.integrations._transformers_checks import check_hooks
from marginops.integrations.transformers import MarginTrainer
from marginops.training import (
    MarginSampler,
    ReductionSampler,
    RunRecorder,
    TrainingDynamics,
)


def trainer(folder, data=None, training=None, **options):
    data = texts() if data is None else data
    return make(
        MarginTrainer,
        network(),
        arguments(folder, **(training or {})),
        train_dataset=data,
        **options,
    )


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(texts())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"data": Stream(), "training": {"max_steps": 3}},
            TypeError,
            "the IterableDataset Stream, whose items have no index",
        ),
        (
            {"data": iter(texts()), "training": {"max_steps": 3}},
            TypeError,
            "without __len__ and __getitem__",
        ),
        ({"data": texts(50), "sampler": sampler()}, ValueError, "expected 60 samples.*got 50"),
        ({"dynamics": TrainingDynamics(50)}, ValueError, "expected 50 samples.*got 60"),
        (
            {"sampler": sampler(), "dynamics": TrainingDynamics(SAMPLES)},
            ValueError,
            "dynamics: expected None or those of the sampler, got others",
        ),
        ({"dynamics": 60}, TypeError, "dynamics: expected TrainingDynamics, got int"),
        (
            {"sampler": torch.utils.data.RandomSampler(range(SAMPLES))},
            TypeError,
            "sampler: expected a MarginSampler.* got RandomSampler",
        ),
        (
            {"sampler": MarginSampler(TrainingDynamics(SAMPLES), num_replicas=2, rank=0)},
            ValueError,
            "sampler: expected num_replicas=1.*got 2; make it without group",
        ),
        (
            {"sampler": ReductionSampler(TrainingDynamics(SAMPLES), 5, shrink=True)},
            ValueError,
            "sampler: expected epochs of one length.*shrink=True",
        ),
        ({"select": 0}, ValueError, "select: expected"),
        ({"select": 2.5}, TypeError, "select: expected"),
        ({"schedule": 3}, TypeError, "schedule: expected a SelectionSchedule, got int"),
        ({"key": 3}, TypeError, "key: expected a str, got int"),
        ({"fingerprint": 3}, TypeError, "fingerprint: expected a str, got int"),
        ({"recorder": 3}, TypeError, "recorder: expected a RunRecorder, got int"),
        (
            {"sampler": sampler(), "training": {"ignore_data_skip": True}},
            ValueError,
            "ignore_data_skip: expected False",
        ),
        (
            {
                "sampler": sampler(),
                "training": {"accelerator_config": {"split_batches": True}},
            },
            ValueError,
            "split_batches: expected False",
        ),
    ],
)
def test_wrong_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **options)


def test_a_host_that_draws_by_length_cannot_have_a_sampler(tmp_path):
    is_new = hasattr(arguments(tmp_path), "train_sampling_strategy")
    training = {"train_sampling_strategy" if is_new else "group_by_length": "group_by_length"}
    with pytest.raises(ValueError, match="expected random, got group_by_length"):
        trainer(tmp_path, training=training, sampler=sampler())


def test_a_column_with_the_name_of_the_key(tmp_path):
    data = [{**item, "index": 0} for item in texts()]
    kept = {"remove_unused_columns": False}
    with pytest.raises(ValueError, match="key: expected a name that the batches do not have"):
        trainer(tmp_path, data, kept).train()
    done = trainer(tmp_path, data, {"max_steps": 1})  # the host removes the column
    done.train()
    assert int(done.dynamics.count.sum()) == 10
    with pytest.raises(ValueError, match="'labels', a column"):
        trainer(tmp_path, key="labels").train()


def test_a_collator_that_returns_no_dict(tmp_path):
    with pytest.raises(TypeError, match="data_collator: expected a dict of tensors, got tuple"):
        trainer(tmp_path, data_collator=lambda items: (items,)).train()


def test_a_loader_of_the_user_drops_the_indices(tmp_path):
    class Own(MarginTrainer):
        def get_train_dataloader(self):
            return Trainer.get_train_dataloader(self)

    for options in ({}, {"select": 2}):
        made = make(Own, network(), arguments(tmp_path), train_dataset=texts(), **options)
        with pytest.raises(ValueError, match="index: expected the indices of the samples"):
            made.train()


def test_a_collator_that_joins_samples(tmp_path):
    def join(items):
        return {"input_ids": torch.tensor([items[0]["input_ids"]]), "labels": torch.tensor([1])}

    with pytest.raises(ValueError, match=r"indices: expected shape \[1\].*got \[10\]"):
        trainer(tmp_path, data_collator=join).train()
    with pytest.raises(ValueError, match="select: expected one row for each of 10 samples"):
        trainer(tmp_path, data_collator=join, select=2).train()


def test_labels_that_are_no_classes(tmp_path):
    data = [{"input_ids": item["input_ids"]} for item in texts()]
    with pytest.raises(ValueError, match="inputs: expected one label for each sample"):
        made = trainer(tmp_path, data, compute_loss_func=lambda outputs, *_, **__: 0)
        made.train()


def test_no_training_data(tmp_path):
    made = make(MarginTrainer, network(), arguments(tmp_path), dynamics=TrainingDynamics(SAMPLES))
    assert len(made.predict(texts(4)).predictions) == 4
    with pytest.raises(TypeError, match="train_dataset: expected a data set, got None"):
        made.train()


def test_a_host_without_the_methods_is_refused():
    old = {name: value for name, value in vars(Trainer).items() if name != "get_batch_samples"}
    with pytest.raises(ImportError, match=r"Trainer.get_batch_samples\(.*install a version"):
        check_hooks(types.new_class("Trainer", exec_body=lambda body: body.update(old)))

    def compute_loss(self, model, inputs, return_outputs=False):
        raise NotImplementedError

    with pytest.raises(ImportError, match=r"Older.compute_loss\(model, inputs, return"):
        type("Host", (MarginTrainer, type("Older", (Trainer,), {"compute_loss": compute_loss})), {})


def test_the_order_of_the_bases():
    class Other(Trainer):
        pass

    with pytest.raises(TypeError, match=r"write class Wrong\(MarginTrainer, Other\)"):
        type("Wrong", (Other, MarginTrainer), {})
    assert issubclass(type("Right", (MarginTrainer, Other), {}), Other)


def test_a_host_with_a_loader_of_its_own_is_refused():
    class Loader(Trainer):
        def get_train_dataloader(self):
            raise NotImplementedError

    with pytest.raises(TypeError, match="got Loader, whose own one MarginTrainer cannot keep"):
        type("Both", (MarginTrainer, Loader), {})


@pytest.mark.parametrize("version", [None, "4.56.2", "6.0.0"])
def test_a_host_that_is_missing_or_of_another_version(version):
    code = f"""
import importlib.metadata as metadata
known = metadata.version
def version(package):
    if package != "transformers":
        return known(package)
    if {version!r} is None:
        raise metadata.PackageNotFoundError(package)
    return {version!r}
metadata.version = version
import marginops.integrations.transformers
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        f"transformers: expected a version >= 4.57 and < 6, got {str(version).lower()}; pip install"
    ) in done.stderr


def test_a_recorder_of_other_dynamics(tmp_path):
    recorder = RunRecorder(tmp_path / "run", TrainingDynamics(SAMPLES))
    with pytest.raises(ValueError, match="recorder: expected a recorder of the same dynamics"):
        trainer(tmp_path, sampler=sampler(), recorder=recorder)
    with pytest.raises(ValueError, match="recorder: expected a recorder of the same dynamics"):
        trainer(tmp_path, dynamics=TrainingDynamics(SAMPLES), recorder=recorder)
    assert trainer(tmp_path, recorder=recorder).dynamics is recorder.dynamics


def test_two_trainers_cannot_train_at_once_with_one_sampler(tmp_path):
    class Inner(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.epoch > 1:
                trainer(tmp_path / "inner", training={"max_steps": 1}, sampler=order).train()

    order = sampler()
    with pytest.raises(ValueError, match="epoch: expected the sampler in epoch 1"):
        trainer(tmp_path, sampler=order, callbacks=[Inner()]).train()


def test_dynamics_away_from_the_gpu_are_told(tmp_path, monkeypatch):
    from marginops.integrations import transformers as adapter

    asked = []
    monkeypatch.setattr(adapter, "warn_of_waiting", lambda *args: asked.append(args))
    made = trainer(tmp_path)
    assert asked == [(made.dynamics, made.args.device)]
    with pytest.warns(UserWarning, match="device of the training, cuda, got cpu"):
        warn_of_waiting(made.dynamics, torch.device("cuda", 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_waiting(made.dynamics, torch.device("cpu"))
