"""MarginCallback trains as bare Lightning and as a plain loop do, and resumes anywhere."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from marginops.training import (
    Indexed,
    ReductionSampler,
    SelectionSchedule,
    TrainingDynamics,
    select_batch,
)

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
from helpers import lightning_runs as runs  # noqa: E402
from helpers.rounding import assert_same  # noqa: E402
from marginops.integrations.lightning import MarginCallback  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lightning_images.py"
BATCHES = runs.VISITED // runs.BATCH  # of an epoch


def assert_same_run(run, expected, first=0):
    assert run["seen"] == expected["seen"][first:]
    for one, other in zip(run["parameters"], expected["parameters"], strict=True):
        assert_same(one, other)
    assert_same_dynamics(run["dynamics"], expected["dynamics"])


def assert_same_dynamics(one, other):
    assert one.keys() == other.keys()
    for name, value in other.items():
        if isinstance(value, torch.Tensor):
            assert_same(one[name], value)
        else:
            assert one[name] == value


def plain_loop(epochs=4):
    """The training of :func:`runs.train`, without Lightning."""
    sampler, network, seen = runs.make_sampler(), runs.network(), []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    loader = runs.make_loader(sampler)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for inputs, target, ids in loader:
            seen.append((epoch, ids.tolist()))
            logits = network(inputs)
            sampler.dynamics.update(ids, logits.detach(), target)
            optimizer.zero_grad()
            functional.cross_entropy(logits, target).backward()
            optimizer.step()
    sampler.set_epoch(epochs)
    parameters = [parameter.detach() for parameter in network.parameters()]
    return {"seen": seen, "parameters": parameters, "dynamics": sampler.dynamics.state_dict()}


@pytest.mark.parametrize("manual", [False, True])
def test_training_is_that_of_a_plain_loop(tmp_path, manual):
    run = runs.train(tmp_path, manual=manual, validate=not manual)
    assert_same_run(run, plain_loop())


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str
)
def test_recording_changes_nothing_of_a_training(tmp_path, options):
    results, dynamics = [], TrainingDynamics(runs.SAMPLES)
    for callbacks in ([], [MarginCallback(dynamics=dynamics)]):
        model = runs.Model()
        torch.manual_seed(7)
        loader = DataLoader(Indexed(runs.data()), batch_size=5, shuffle=True)
        runs.fit(runs.trainer(tmp_path, *callbacks, **options), model, loader)
        results.append((model.seen, [*model.parameters()]))
    assert results[0][0] == results[1][0]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert_same(one, other)
    assert dynamics.count.tolist() == [4] * runs.SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_resumes_after_any_batch(tmp_path, options, workers):
    whole = runs.train(tmp_path, saves={"every_n_train_steps": 1}, **options)
    batches = options.get("accumulate_grad_batches", 1)
    for batch in (1, BATCHES - 2, BATCHES, BATCHES + 3) if workers == 0 else (2, BATCHES):
        if batch % batches == 0:
            checkpoint = f"{tmp_path}/{batch // batches}.ckpt"
            run = runs.train(tmp_path, checkpoint, workers=workers, **options)
            assert_same_run(run, whole, first=batch)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_with_a_loader_that_has_a_state(tmp_path, workers):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    options = {"loader": torchdata.StatefulDataLoader, "workers": workers}
    whole = runs.train(tmp_path, saves={"every_n_train_steps": 1}, **options)
    for batch in (5, BATCHES, BATCHES + 3):
        run = runs.train(tmp_path, f"{tmp_path}/{batch}.ckpt", **options)
        assert_same_run(run, whole, first=batch)


@pytest.mark.parametrize(
    ("saves", "options", "steps"),
    [
        ({"every_n_epochs": 1}, {}, (8, 24)),
        ({"every_n_epochs": 1}, {"validate": True}, (8, 16)),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, {"validate": True}, (8, 16)),
        (
            {"every_n_epochs": 1, "save_on_train_epoch_end": False},
            {"validate": True, "val_check_interval": 4},
            (4, 8, 12),
        ),
        ({"every_n_train_steps": 1}, {"max_epochs": None, "max_steps": 28}, (5, 8)),
        ({"every_n_train_steps": 1}, {"limit_train_batches": 5}, (4, 5, 6)),
    ],
    ids=str,
)
def test_resumes_from_checkpoints_of_every_kind(tmp_path, saves, options, steps):
    whole = runs.train(tmp_path, saves=saves, **options)
    for step in steps:
        run = runs.train(tmp_path, f"{tmp_path}/{step}.ckpt", **options)
        assert_same_run(run, whole, first=step)


def test_test_with_a_checkpoint_leaves_the_state(tmp_path):
    callback, model = MarginCallback(runs.make_sampler()), runs.Model()
    model.test_step = lambda batch: None
    trainer = runs.trainer(tmp_path, callback, runs.checkpoints(tmp_path, every_n_epochs=1))
    loader = runs.make_loader(callback.progress.sampler)
    runs.fit(trainer, model, loader)
    before = callback.progress.dynamics.state_dict()
    trainer.test(model, runs.make_loader(None), ckpt_path=f"{tmp_path}/8.ckpt", verbose=False)
    assert_same_dynamics(callback.progress.dynamics.state_dict(), before)


class SelectingModel(runs.Model):
    """Selects by hand what the callback selects in the other model."""

    def __init__(self, k, schedule=None):
        super().__init__()
        self.k, self.schedule = k, schedule

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        if self.schedule is not None and not self.schedule.is_active(self.trainer.global_step):
            return batch
        chosen = select_batch(self.network, batch[0], min(self.k, len(batch[0])))
        return tuple(part[chosen] for part in batch)


class Data(lightning.LightningDataModule):
    """Counts the calls of its own hook."""

    def __init__(self, loader):
        super().__init__()
        self.loader, self.calls = loader, 0

    def train_dataloader(self):
        return self.loader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls += 1
        return batch


@pytest.mark.parametrize("schedule", [None, SelectionSchedule(begin=2, end=6)])
def test_selection_trains_on_what_select_batch_selects(tmp_path, schedule):
    models, modules = [SelectingModel(2, schedule), runs.Model()], []
    for model in models:
        arguments = {} if model is models[0] else {"select": 2, "schedule": schedule}
        callback = MarginCallback(runs.make_sampler(), **arguments)
        # Without select, the callback counts what it sees, so it has no part in the first run.
        callbacks = [callback] if arguments else [_SetsEpochs(callback.progress)]
        loader = runs.make_loader(callback.progress.sampler)
        data = Data(loader)
        trainer = runs.trainer(tmp_path, *callbacks)
        runs.fit(
            trainer,
            model,
            None if arguments else loader,
            **{"datamodule": data} if arguments else {},
        )
        modules.append(data)
    selected = [len(ids) for _, ids in models[1].seen]
    assert selected == ([2] * 32 if schedule is None else [3] * 2 + [2] * 4 + [3] * 26)
    assert models[0].seen == models[1].seen
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same(one, other)
    assert modules[1].calls == 32
    assert "on_after_batch_transfer" not in vars(modules[1])


class _SetsEpochs(lightning.Callback):
    """Records as MarginCallback does, in few lines and for a training in one process."""

    def __init__(self, progress):
        self.progress = progress

    def on_fit_start(self, trainer, module):
        self.progress.begin_epoch(0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.progress.dynamics.update(batch[2], outputs["logits"].detach(), batch[1])

    def on_train_epoch_end(self, trainer, module):
        self.progress.begin_epoch(trainer.current_epoch + 1)


def test_selection_leaves_validation_alone_and_has_the_precision_of_training(tmp_path):
    class Watched(runs.Model):
        def forward(self, inputs):
            logits = self.network(inputs)
            dtypes.add(logits.dtype)
            return logits

        def validation_step(self, batch):
            sizes.append(len(batch[0]))

    dtypes, sizes = set(), []
    callback = MarginCallback(runs.make_sampler(), select=2)
    trainer = runs.trainer(tmp_path, callback, precision="bf16-mixed", max_epochs=1)
    loader = runs.make_loader(callback.progress.sampler)
    runs.fit(trainer, Watched(), loader, val_dataloaders=runs.make_loader(None))
    assert dtypes == {torch.bfloat16}
    assert set(sizes) == {runs.BATCH}
    assert int(callback.progress.dynamics.count.sum()) == 2 * BATCHES


def test_selection_resumes_at_the_position_of_the_loader(tmp_path):
    def train(checkpoint=None):
        model, callback = runs.Model(), MarginCallback(runs.make_sampler(), select=2)
        keeps = [] if checkpoint else [runs.checkpoints(tmp_path, every_n_train_steps=1)]
        trainer = runs.trainer(tmp_path, callback, *keeps)
        loader = runs.make_loader(callback.progress.sampler)
        runs.fit(trainer, model, loader, ckpt_path=checkpoint)
        return model.seen

    whole = train()
    assert train(f"{tmp_path}/5.ckpt") == whole[5:]


def test_module_records_and_takes_the_loss_of_the_update(tmp_path):
    class Fused(runs.Model):
        def training_step(self, batch):
            inputs, target, ids = batch
            self.seen.append((self.trainer.current_epoch, ids.tolist()))
            return callback.progress.update(ids, self(inputs), target).mean_loss()

    model, callback = Fused(), MarginCallback(runs.make_sampler(), logits=None)
    loader = runs.make_loader(callback.progress.sampler)
    runs.fit(runs.trainer(tmp_path, callback), model, loader)
    expected = plain_loop()
    assert model.seen[:BATCHES] == expected["seen"][:BATCHES]
    assert callback.progress.dynamics.num_updates == 32
    for one, other in zip(model.parameters(), expected["parameters"], strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-3, atol=1e-4)

    forgetful = MarginCallback(runs.make_sampler(), logits=None)
    loader = runs.make_loader(forgetful.progress.sampler)
    with pytest.raises(ValueError, match="progress: expected calls of"):
        runs.fit(runs.trainer(tmp_path, forgetful), runs.Model(), loader)


def test_reduction_that_shrinks_tells_the_host(tmp_path):
    def train(**options):
        sampler = ReductionSampler(TrainingDynamics(48), num_kept=12, trigger=0.1, shrink=True)
        model, callback = runs.Model(), MarginCallback(sampler)
        trainer = runs.trainer(tmp_path, callback, **options)
        runs.fit(trainer, model, runs.make_loader(sampler))
        return [sum(epoch == number for epoch, _ in model.seen) for number in range(4)]

    assert train(reload_dataloaders_every_n_epochs=1) == [16, 4, 4, 4]
    with pytest.raises(ValueError, match="sampler: expected shrink=False"):
        train()


def test_mappings_and_skipped_steps(tmp_path):
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return runs.SAMPLES

        def __getitem__(self, index):
            inputs, target = runs.data()[index]
            return {"pixels": inputs, "label": target}

    class Mapped(runs.Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                return None
            logits = self(batch["pixels"])
            return {"loss": functional.cross_entropy(logits, batch["label"]), "scores": logits}

    dynamics = TrainingDynamics(runs.SAMPLES)
    callback = MarginCallback(
        dynamics=dynamics, key="id", logits="scores", select=4, inputs="pixels"
    )
    loader = DataLoader(Indexed(Pairs(), key="id"), batch_size=8)
    runs.fit(runs.trainer(tmp_path, callback, max_epochs=1), Mapped(), loader)
    assert int(dynamics.count.sum()) == 4 * 5
    assert callback.progress.epoch == 1


def test_example_has_three_lines_more_than_bare_lightning(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    lines = EXAMPLE.read_text().replace("max_epochs=10", "max_epochs=1").splitlines()
    last = lines.index("trainer.fit(model, loader)") + 1
    added = [line for line in lines if line.endswith("# ours")]
    assert 0 < len(added) <= 3
    imports = ("from marginops.integrations", "from marginops.training")
    bare = [line for line in lines[:last] if line not in added and not line.startswith(imports)]
    code = "\n".join(bare).replace("sampler=sampler", "shuffle=True")
    assert "sampler" not in code.partition('"""\n\n')[2]
    exec(code, names := {"__name__": "bare"})
    assert names["trainer"].global_step > 40
    exec("\n".join(lines), names := {"__name__": "ours"})
    assert names["visits"] == names["trainer"].current_epoch * len(names["sampler"])


class Reads(TorchDispatchMode):
    """Counts the operations that copy a value of a tensor to Python, for which a GPU waits."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        )
        return function(*arguments, **(options or {}))


def test_step_reads_no_value(tmp_path):
    class Watched(MarginCallback):
        steps = 0

        def on_train_batch_end(self, *arguments):
            with Reads() as reads:
                super().on_train_batch_end(*arguments)
            # The first step compares the ids with those of the sampler.
            assert reads.count == 0 or self.steps == 0
            self.steps += 1

    sampler = runs.make_sampler()
    callback = Watched(sampler)
    runs.fit(runs.trainer(tmp_path, callback), runs.Model(), runs.make_loader(sampler))
    assert callback.steps == 32
    with Reads() as reads:
        torch.ones(1).item()
    assert reads.count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_step_does_not_wait_for_the_gpu(tmp_path):
    class Watched(MarginCallback):
        steps = 0

        def on_train_batch_end(self, *arguments):
            torch.cuda.set_sync_debug_mode("error" if self.steps else "default")
            try:
                super().on_train_batch_end(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            self.steps += 1

    sampler = runs.make_sampler(dynamics=TrainingDynamics(runs.SAMPLES, device="cuda"))
    callback = Watched(sampler)
    trainer = runs.trainer(tmp_path, callback, accelerator="gpu")
    runs.fit(trainer, runs.Model(), runs.make_loader(sampler))
    assert callback.steps == 32
    assert int(callback.progress.dynamics.count.sum()) == 4 * runs.VISITED


def test_nothing_of_a_batch_stays_alive(tmp_path):
    sampler = runs.make_sampler()
    callback = MarginCallback(sampler, select=2)
    runs.fit(runs.trainer(tmp_path, callback), runs.Model(), runs.make_loader(sampler))
    held = [value for value in vars(callback).values() if isinstance(value, torch.Tensor)]
    assert held == [] and callback._hook_owner is None and callback._unrecorded is None


def test_interrupted_training_gives_the_hook_back(tmp_path):
    class Fails(runs.Model):
        def training_step(self, batch):
            raise KeyError("wrong")

    sampler, model = runs.make_sampler(), Fails()
    trainer = runs.trainer(tmp_path, MarginCallback(sampler, select=2))
    with pytest.raises(KeyError, match="wrong"):
        runs.fit(trainer, model, runs.make_loader(sampler))
    assert "on_after_batch_transfer" not in vars(model)
