"""A Trainer of Lightning with MarginCallback."""

import logging
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional
from torch.utils.data import DataLoader

from marginops.integrations.lightning import MarginCallback
from marginops.training import Indexed

from .run import EPOCHS, Run, make_data, make_network, make_optimizer, make_sampler

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class _Module(LightningModule):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.network, self.run = make_network(), run

    def training_step(self, batch: Any) -> dict[str, torch.Tensor]:
        inputs, target, ids = batch
        self.run.note(ids)
        logits = self.network(inputs)
        return {"loss": functional.cross_entropy(logits, target), "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.network)


def train(run: Run) -> None:
    sampler, callbacks = make_sampler(), []
    if run.save_at is not None:
        name = {"filename": "state", "auto_insert_metric_name": False}
        callbacks = [ModelCheckpoint(run.folder, every_n_train_steps=run.save_at, **name)]
    trainer = Trainer(
        **{"max_epochs": EPOCHS, "accelerator": "cpu", "devices": run.ranks, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": run.save_at is not None, "default_root_dir": run.folder},
        strategy="ddp" if run.ranks > 1 else "auto",
        callbacks=[MarginCallback(sampler), *callbacks],
    )
    loader = DataLoader(Indexed(make_data()), run.batch_size, sampler=sampler)
    resume = None if run.resume is None else run.resume[0] / "state.ckpt"
    trainer.fit(_Module(run), loader, ckpt_path=resume)
