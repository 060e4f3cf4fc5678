"""The loader of a Trainer of Transformers, with the indices of the samples in its batches."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from ..training.samplers.epoch_sampler import EpochSampler
from ._transformers_batches import Numbered, NumberedCollator, SharedBatches

_LABELS = 32  # a batch, so that reading them costs little


def training_loader(trainer: Any, order: EpochSampler | None, key: str) -> DataLoader[Any]:
    """What the Trainer makes itself for its training, in an order of ours if there is one."""
    args = trainer.args
    dataset, collator = _numbered(trainer, key)
    options: dict[str, Any] = {
        name: getattr(args, f"dataloader_{name}")
        for name in (
            *("num_workers", "pin_memory", "persistent_workers", "prefetch_factor"),
            *("multiprocessing_context", "in_order"),
        )
        if hasattr(args, f"dataloader_{name}")
    }
    drop_last, size = args.dataloader_drop_last, trainer._train_batch_size
    if order is None:
        sampler = trainer._get_train_sampler(trainer.train_dataset)
        options |= {"sampler": sampler, "batch_size": size, "drop_last": drop_last}
    else:
        options["batch_sampler"] = SharedBatches(order, size, args.world_size, drop_last)
    return DataLoader(
        dataset,
        collate_fn=collator,
        worker_init_fn=partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        ),
        **options,
    )


def labels_checksum(trainer: Any, key: str) -> str | None:
    """A checksum of labels from all over the data set; None if its batches have no single label.

    It reads them as a batch of the training, so it works for all that the collator can read. It
    leaves out the other parts of the items, because augmented images differ each time.
    """
    dataset, collator = _numbered(trainer, key)
    rows = torch.linspace(0, len(dataset) - 1, min(_LABELS, len(dataset)), dtype=torch.float64)
    with _same_random_numbers():
        batch = collator(dataset.__getitems__(rows.long().tolist()))
    names = [name for name in trainer.label_names if name in batch]
    if len(names) != 1:
        return None
    labels = torch.as_tensor(batch[names[0]]).cpu().flatten().view(torch.uint8)
    return f"{len(rows)} labels {zlib.crc32(labels.numpy().data):08x}"


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Give the block the same random numbers at every call, and the training those it had."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(0)
            np.random.seed(0)
            torch.default_generator.manual_seed(0)
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _numbered(trainer: Any, key: str) -> tuple[Numbered, NumberedCollator]:
    """The data set and the collator as the Trainer would use them, and with indices."""
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if _is_table(dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    return Numbered(dataset), NumberedCollator(collator, key)


def _is_table(dataset: Any) -> bool:
    """Whether a data set is one of the library datasets, which removes unused columns itself."""
    if not transformers.utils.is_datasets_available():
        return False
    import datasets

    return isinstance(dataset, datasets.Dataset)
