"""Wrong use of MarginCallback is one clear error, and nothing is lost."""

import importlib.util
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from marginops.training import TrainingDynamics

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
from helpers import lightning_runs as runs  # noqa: E402
from helpers.rounding import assert_same  # noqa: E402
from marginops.integrations import lightning as adapter  # noqa: E402
from marginops.integrations.lightning import MarginCallback  # noqa: E402


def assert_same_dynamics(one, other):
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert_same(one[name], value)


def spoiled(**changes):
    """The pieces of a training, some of them spoiled."""
    sampler = runs.make_sampler()
    pieces = {
        "callback": lambda: MarginCallback(sampler),
        "loader": lambda: runs.make_loader(sampler),
        "model": runs.Model,
    }
    pieces.update(changes)
    return {name: make() for name, make in pieces.items()}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class NoLogits(runs.Model):
    def training_step(self, batch):
        return super().training_step(batch)["loss"]


def bare_loader(**options):
    return DataLoader(runs.data(), batch_size=3, **options)


def three_parts_without_ids():
    sampler = runs.make_sampler()
    inputs, target = runs.data().tensors
    loader = DataLoader(TensorDataset(inputs, target, target), batch_size=3, sampler=sampler)
    return {"callback": lambda: MarginCallback(sampler), "loader": lambda: loader}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {
                "loader": bare_loader,
                "callback": lambda: MarginCallback(dynamics=TrainingDynamics(48)),
                "model": lambda: PairModel(),
            },
            ValueError,
            r"batch: expected \(inputs, target, ids\), got 2 elements; wrap",
        ),
        (three_parts_without_ids(), ValueError, r"batch: expected the ids \[.*of the sampler"),
        ({"loader": lambda: DataLoader(Stream())}, TypeError, "expected a map-style data set"),
        ({"model": NoLogits}, ValueError, "training_step: expected 'logits' in the dict"),
        (
            {"loader": lambda: runs.make_loader(None)},
            ValueError,
            "sampler: expected the train loader to use it, got a loader with SequentialSampler",
        ),
        (
            {"callback": lambda: MarginCallback(dynamics=TrainingDynamics(9))},
            ValueError,
            "expected 9 samples as in the dynamics, got 48",
        ),
        (
            {"loader": lambda: {"a": runs.make_loader(None), "b": runs.make_loader(None)}},
            TypeError,
            "train_dataloaders: expected one DataLoader, got dict",
        ),
    ],
)
def test_wrong_training_is_an_error_before_anything_is_lost(tmp_path, changes, error, text):
    pieces = spoiled(**changes)
    callback = pieces["callback"]
    with pytest.raises(error, match=text):
        runs.fit(runs.trainer(tmp_path, callback), pieces["model"], pieces["loader"])
    assert int(callback.progress.dynamics.count.sum()) == 0


class PairModel(runs.Model):
    def training_step(self, batch):
        logits = self(batch[0])
        return {"loss": functional.cross_entropy(logits, batch[1]), "logits": logits}


class Another(MarginCallback):
    """Another callback that records."""


def test_two_callbacks_are_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        runs.trainer(tmp_path, *(MarginCallback(runs.make_sampler()) for _ in range(2)))
    sampler = runs.make_sampler()
    trainer = runs.trainer(tmp_path, MarginCallback(sampler), Another(sampler))
    with pytest.raises(ValueError, match="callbacks: expected one MarginCallback, got 2"):
        runs.fit(trainer, runs.Model(), runs.make_loader(sampler))


def test_wrong_checkpoint_changes_nothing(tmp_path):
    runs.train(tmp_path, saves={"every_n_train_steps": 1}, max_epochs=1)
    other = runs.make_sampler(seed=4)
    before = other.dynamics.state_dict()
    trainer = runs.trainer(tmp_path, MarginCallback(other))
    with pytest.raises(ValueError, match="state_dict: expected seed 4, got 3"):
        runs.fit(trainer, runs.Model(), runs.make_loader(other), ckpt_path=f"{tmp_path}/2.ckpt")
    assert_same_dynamics(other.dynamics.state_dict(), before)

    smaller = MarginCallback(dynamics=TrainingDynamics(9))
    trainer = runs.trainer(tmp_path, smaller)
    with pytest.raises(ValueError, match="state_dict: expected"):
        runs.fit(trainer, runs.Model(), runs.make_loader(None), ckpt_path=f"{tmp_path}/2.ckpt")

    keeps = runs.checkpoints(tmp_path / "bare", every_n_train_steps=1)
    runs.fit(runs.trainer(tmp_path, keeps, max_epochs=1), runs.Model(), runs.make_loader(None))
    trainer = runs.trainer(tmp_path, MarginCallback(other))
    with pytest.raises(ValueError, match="ckpt_path: expected a checkpoint with a state of Margin"):
        runs.fit(
            trainer, runs.Model(), runs.make_loader(other), ckpt_path=f"{tmp_path}/bare/2.ckpt"
        )


def test_a_checkpoint_of_other_data_of_the_same_size_is_refused(tmp_path):
    keeps = runs.checkpoints(tmp_path, every_n_train_steps=1)
    first = runs.make_sampler()
    callback = MarginCallback(first, fingerprint="labels of May")
    trainer = runs.trainer(tmp_path, callback, keeps, max_epochs=1)
    runs.fit(trainer, runs.Model(), runs.make_loader(first))
    second = runs.make_sampler()
    trainer = runs.trainer(tmp_path, MarginCallback(second, fingerprint="labels of June"))
    with pytest.raises(ValueError, match="expected the fingerprint 'labels of June'"):
        runs.fit(trainer, runs.Model(), runs.make_loader(second), ckpt_path=f"{tmp_path}/2.ckpt")
    assert int(second.dynamics.count.sum()) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, TypeError, "dynamics: expected"),
        ({"dynamics": TrainingDynamics(3), "select": 0}, ValueError, "select: expected"),
        ({"dynamics": TrainingDynamics(3), "schedule": 3}, TypeError, "schedule: expected a Sel"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        MarginCallback(**arguments)


@pytest.mark.parametrize("first", [("pytorch_lightning",), ("lightning.pytorch",), ()], ids=str)
def test_callback_is_of_the_lightning_that_is_imported(monkeypatch, first):
    other = pytest.importorskip("pytorch_lightning")
    imported = SimpleNamespace(modules=dict.fromkeys(first))
    monkeypatch.setattr(adapter.host, "sys", imported)
    spec = importlib.util.spec_from_file_location(f"{adapter.__name__}_again", adapter.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.undo()
    callback = module.MarginCallback(dynamics=TrainingDynamics(3))
    host = other if first == ("pytorch_lightning",) else lightning
    assert isinstance(callback, host.Callback)
    assert not isinstance(callback, (lightning if host is other else other).Callback)
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    assert callback in host.Trainer(callbacks=callback, **quiet).callbacks


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("2.5.9", "lightning: expected a version >= 2.6 and < 3, got 2.5.9; pip install"),
        ("3.0.0rc1", "lightning: expected a version >= 2.6 and < 3, got 3.0.0rc1; pip install"),
        (None, "lightning: expected a version >= 2.6 and < 3, got none; pip install"),
    ],
)
def test_host_that_does_not_fit_is_an_error(monkeypatch, version, text):
    def find(package):
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", find)
    monkeypatch.setattr(adapter.host, "sys", SimpleNamespace(modules={}))
    with pytest.raises(ImportError, match=text):
        adapter.host.callback_class()
