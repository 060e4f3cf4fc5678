"""What a Trainer of Transformers has to be for MarginTrainer."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from ._arguments import check_size
from ._transformers_batches import Numbered

_HOOKS = {
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "get_batch_samples": ("epoch_iterator", "num_batches", "device"),
    "get_train_dataloader": (),
    "num_examples": ("dataloader",),
    "_get_collator_with_removed_columns": ("data_collator", "description"),
    "_get_output_dir": ("trial",),
    "_get_train_sampler": ("train_dataset",),
    "_inner_training_loop": ("batch_size", "args", "resume_from_checkpoint"),
    "_load_callback_state": (),
    "_remove_unused_columns": ("dataset", "description"),
    "_save_checkpoint": ("model", "trial"),
}


def check_hooks(host: type) -> None:
    """Check that a Trainer has the methods that MarginTrainer goes into, with their arguments."""
    for name, arguments in _HOOKS.items():
        method = getattr(host, name, None)
        if method is None or not {*arguments} <= {*inspect.signature(method).parameters}:
            raise ImportError(
                f"transformers: expected {host.__name__}.{name}({', '.join(arguments)}), got "
                f"transformers {transformers.__version__} without it; install a version from 4.57 "
                "to 5.24"
            )


def check_sampler(sampler: Any) -> None:
    """Check what TrainingProgress does not check of a sampler."""
    if getattr(sampler, "num_replicas", 1) != 1:
        raise ValueError(
            "sampler: expected num_replicas=1, because the trainer shares each epoch among the "
            f"processes, got {sampler.num_replicas}; make it without group, num_replicas and rank"
        )
    if getattr(sampler, "shrink", False):
        raise ValueError(
            "sampler: expected epochs of one length, because the Trainer reads it once, got "
            "shrink=True; make the sampler without it"
        )


def check_data(trainer: Any) -> None:
    """Check that data set, sampler, dynamics and arguments of a trainer fit."""
    args, sampler = trainer.args, trainer.progress.sampler
    check_size("train_dataset", len(Numbered(trainer.train_dataset)), trainer.dynamics.num_samples)
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(args, "group_by_length", False):
        strategy = "group_by_length"
    if strategy == "batch_rebalance" or (sampler is not None and strategy != "random"):
        raise ValueError(
            f"train_sampling_strategy: expected random, got {strategy}, which draws the batches "
            "itself"
        )
    if sampler is not None and args.ignore_data_skip:
        raise ValueError(
            "ignore_data_skip: expected False with sampler=, got True; a resumed sampler skips "
            "without loading data"
        )
    if sampler is not None and trainer.accelerator.split_batches:
        raise ValueError(
            "split_batches: expected False in accelerator_config with sampler=, got True; the "
            "trainer shares each epoch among the processes itself"
        )
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise ValueError(
            "parallelism_config: expected None, got one; MarginTrainer counts each process as one "
            "that trains on samples of its own"
        )
