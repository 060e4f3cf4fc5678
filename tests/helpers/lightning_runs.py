"""Trainings by Lightning on a few samples, which note the ids that they visit."""

import contextlib
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from marginops.integrations.lightning import MarginCallback
from marginops.training import Indexed, MarginSampler, SmallestMargins, TrainingDynamics

SAMPLES, VISITED, BATCH = 48, 24, 3
_ADVICE = (
    "does not have many workers",
    "Checkpoint directory",
    "add the following callbacks",
    "manual optimization",
    "returned `None`",
)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, :4].argmax(1) + (inputs[:, 4] > 1)) % 4)


def network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


class Model(lightning.LightningModule):
    """Notes the ids of each batch, with the epoch."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.network = network()
        self.automatic_optimization = not manual
        self.seen: list[tuple[int, list[int]]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any) -> Any:
        inputs, target, ids = batch
        self.seen.append((self.trainer.current_epoch, ids.tolist()))
        logits = self(inputs)
        loss = functional.cross_entropy(logits, target)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)


def make_sampler(dynamics: TrainingDynamics | None = None, **options: Any) -> MarginSampler:
    options = {"num_samples": VISITED, "seed": 3} | options
    dynamics = TrainingDynamics(SAMPLES) if dynamics is None else dynamics
    return MarginSampler(dynamics, SmallestMargins(), **options)


def make_loader(sampler: Any, kind: type = DataLoader, workers: int = 0, **options: Any) -> Any:
    options = {"batch_size": BATCH} | options
    if workers:
        options["multiprocessing_context"] = "fork"
    return kind(Indexed(data()), sampler=sampler, num_workers=workers, **options)


def trainer(folder: Path | str, *callbacks: Any, **options: Any) -> lightning.Trainer:
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
    keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 4, "accelerator": "cpu", "devices": 1} | options
    return lightning.Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=keeps,
        **quiet,
        **options,
    )


def fit(trainer: lightning.Trainer, model: Any, loader: Any, **options: Any) -> None:
    """Train without the advice of Lightning, but with all other warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in _ADVICE:
            warnings.filterwarnings("ignore", f".*{text}")
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        trainer.fit(model, loader, **options)


def checkpoints(folder: Path | str, **options: Any) -> ModelCheckpoint:
    """A callback that keeps all its checkpoints, named by their step."""
    return ModelCheckpoint(
        dirpath=folder, filename="{step}", auto_insert_metric_name=False, save_top_k=-1, **options
    )


@contextlib.contextmanager
def as_rank(rank: int, ranks: int) -> Any:
    """The environment by which Lightning knows its rank; the process group exists already."""
    variables = dict(
        RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, GROUP_RANK=0, LOCAL_WORLD_SIZE=ranks,
        TORCHELASTIC_RUN_ID="x", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    before = dict(os.environ)
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def train(folder: Path | str, ckpt_path: str | None = None, **options: Any) -> dict[str, Any]:
    """A training with a sampler: ids by epoch, parameters and dynamics."""
    kind, workers = options.pop("loader", DataLoader), options.pop("workers", 0)
    batch_size = options.pop("batch_size", BATCH)
    saves = options.pop("saves", None)
    callbacks = [] if saves is None else [checkpoints(folder, **saves)]
    manual = options.pop("manual", False)
    validate = options.pop("validate", False)
    sampler = make_sampler()
    callback = MarginCallback(sampler)
    model = Model(manual)
    if validate:
        model.validation_step = lambda batch: model(batch[0]).sum()
    loader = make_loader(sampler, kind, workers, batch_size=batch_size)
    others = {"val_dataloaders": make_loader(None)} if validate else {}
    run = trainer(folder, callback, *callbacks, **options)
    fit(run, model, loader, ckpt_path=ckpt_path, **others)
    return {
        "seen": model.seen,
        "parameters": [parameter.detach().clone() for parameter in model.parameters()],
        "dynamics": sampler.dynamics.state_dict(),
        "steps": run.global_step,
    }


def train_on_rank(groups: Any, arguments: tuple[int, str, str | None, dict[str, Any]]) -> Any:
    """:func:`train` as one of several ranks."""
    rank, folder, ckpt_path, options = arguments
    ranks = torch.distributed.get_world_size()
    with warnings.catch_warnings(), as_rank(rank, ranks):
        warnings.simplefilter("ignore")
        return train(folder, ckpt_path, strategy="ddp", devices=ranks, **options)
