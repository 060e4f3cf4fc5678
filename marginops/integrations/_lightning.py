"""What the callback for Lightning asks of a trainer and its loops."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib import util
from typing import Any

from torch.utils.data import BatchSampler, IterableDataset

from ..training import TrainingDynamics
from ._arguments import check_size, warn_of_waiting
from ._hosts import check_host

_PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


def callback_class() -> type:
    """The class of callbacks of the Lightning that the program uses.

    Lightning comes as ``lightning`` and as ``pytorch_lightning``, and a trainer of one refuses
    callbacks of the other. The callback belongs to each of the two that is imported already, or
    else to the first that is installed.
    """
    used = [name for name, module in _PACKAGES.items() if module in sys.modules]
    if not used:
        used = [name for name in _PACKAGES if util.find_spec(name)][:1] or ["lightning"]
    for name in used:
        check_host(name.replace("_", "-"), "2.6", "3", "lightning>=2.6,<3")
    bases = tuple(importlib.import_module(_PACKAGES[name]).Callback for name in used)
    return type("Callback", bases, {})


def check_trainer(trainer: Any, kind: type, sampler: Any, dynamics: TrainingDynamics) -> None:
    """Check that a trainer can train with a sampler."""
    callbacks = sum(isinstance(callback, kind) for callback in trainer.callbacks)
    if callbacks > 1:
        raise ValueError(
            f"callbacks: expected one {kind.__name__}, got {callbacks}; every batch would count "
            "several times"
        )
    if getattr(sampler, "shrink", False) and trainer.reload_dataloaders_every_n_epochs != 1:
        raise ValueError(
            "sampler: expected shrink=False, because Lightning reads the length of a loader once, "
            "got True; pass Trainer(reload_dataloaders_every_n_epochs=1)"
        )
    ranks = getattr(trainer, "distributed_sampler_kwargs", None) or {}
    if ranks.get("num_replicas", trainer.world_size) != trainer.world_size:
        raise ValueError(
            f"strategy: expected that all {trainer.world_size} processes share the samples, got "
            f"{ranks['num_replicas']} shares; use a strategy such as ddp"
        )
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        warnings.warn(
            "strategy: expected one whose processes run this program, such as ddp, got one that "
            "starts its own; the dynamics after fit are in the checkpoint and not in this process",
            stacklevel=2,
        )
    warn_of_waiting(dynamics, trainer.strategy.root_device)


def train_loader(trainer: Any, sampler: Any, num_samples: int) -> Any:
    """The loader of the training, which has to use the sampler and to have so many samples."""
    loader = trainer.train_dataloader
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        raise TypeError(
            f"train_dataloaders: expected one DataLoader, got {type(loader).__name__}; join the "
            "data sets, for example by torch.utils.data.ConcatDataset"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            "train_dataloaders: expected a map-style data set, whose samples have ids, got "
            f"{type(dataset).__name__}; use a data set with __getitem__ and __len__"
        )
    check_size("train_dataloaders", len(dataset), num_samples)
    own = getattr(loader, "sampler", None), getattr(loader.batch_sampler, "sampler", None)
    if sampler is not None and not any(each is sampler for each in own):
        got = type(own[0]).__name__
        raise ValueError(
            f"sampler: expected the train loader to use it, got a loader with {got}; pass "
            "DataLoader(..., sampler=sampler), without overfit_batches in the Trainer"
        )
    return loader


def batches_left(loader: Any, sampler: Any) -> int | None:
    """How many batches the loader has left in the epoch; None if its batches are not known."""
    samples = len(sampler.indices())
    if loader.batch_sampler is None:
        return samples
    size = getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(size, int):
        return None
    return samples // size if loader.batch_sampler.drop_last else -(-samples // size)


def set_batches_done(trainer: Any, done: int) -> None:
    """Let the loop go on after so many batches of the epoch.

    A checkpoint counts the batches of one rank, which mean another position on another number of
    ranks. Whether the last of them is completed depends on the hook that saved the checkpoint.
    """
    count = trainer.fit_loop.epoch_loop.batch_progress.current
    pending = count.ready - count.completed
    count.ready = count.started = count.processed = done
    count.completed = done - pending


def begins_next_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether the loop goes on with the epoch after that of a checkpoint.

    So it is if the checkpoint was saved in ``on_train_batch_end`` of the last batch of an epoch.
    The loop does not call ``on_train_epoch_end`` then. The state of a loader that keeps one tells
    it to end at once, so it is left out.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches = loop["epoch_loop.batch_progress"]
    count = batches["current"]
    if not batches["is_last_batch"] or count["completed"] == count["processed"]:
        return False
    loop["state_dict"].pop("combined_loader", None)
    return True


def is_plain(loader: Any) -> bool:
    """Whether the batches of a loader are those of its sampler in their order."""
    return loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler


def defines(instance: Any, hook: str) -> bool:
    """Whether the class of a module or data module defines a hook itself."""
    owner = next(kind for kind in type(instance).__mro__ if hook in vars(kind))
    return owner.__module__.split(".")[0] not in _PACKAGES
