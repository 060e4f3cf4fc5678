"""The loader of a Trainer of Transformers, with the indices of the samples in its batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import transformers
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from ..training.samplers.epoch_sampler import EpochSampler
from ._batches import Numbered, NumberedCollator, SharedBatches


def training_loader(trainer: Any, order: EpochSampler | None, key: str) -> DataLoader[Any]:
    """What the Trainer makes itself for its training, in an order of ours if there is one."""
    args, dataset, collator = trainer.args, trainer.train_dataset, trainer.data_collator
    if _is_table(dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
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
        Numbered(dataset),
        collate_fn=NumberedCollator(collator, key),
        worker_init_fn=partial(
            seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index
        ),
        **options,
    )


def _is_table(dataset: Any) -> bool:
    """Whether a data set is one of the library datasets, which removes unused columns itself."""
    if not transformers.utils.is_datasets_available():
        return False
    import datasets

    return isinstance(dataset, datasets.Dataset)
