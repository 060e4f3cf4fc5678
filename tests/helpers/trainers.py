"""A tiny text classifier, its data, and trainers of Transformers that note what they visit."""

import itertools
import os
import warnings
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from marginops.integrations.transformers import MarginTrainer
from marginops.training import MarginSampler, TrainingDynamics

VOCABULARY, LENGTH, CLASSES, SAMPLES = 40, 6, 3, 60


def texts(count: int = SAMPLES, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose words tell the class, more or less."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    words[:, 0] = 1 + labels
    return [
        {"input_ids": row.tolist(), "labels": int(label)}
        for row, label in zip(words, labels, strict=True)
    ]


def network(dropout: float = 0.0) -> nn.Module:
    """The same network at every call."""
    torch.manual_seed(1)
    config = DistilBertConfig(
        **{"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2},
        **{"num_labels": CLASSES, "max_position_embeddings": LENGTH, "initializer_range": 0.2},
        **{"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout},
    )
    return DistilBertForSequenceClassification(config)


def arguments(folder: Any, **options: Any) -> TrainingArguments:
    """Plain gradient descent on the CPU, in batches of 10."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # an earlier training may have left it
    defaults = {
        **{"output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"},
        **{"max_grad_norm": 0.0, "per_device_train_batch_size": 10, "num_train_epochs": 2},
        **{"save_strategy": "no", "logging_strategy": "no", "dataloader_pin_memory": False},
    }
    return TrainingArguments(**{**defaults, **options})


class Bag(nn.Module):
    """A network of plain layers, which never wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.words(input_ids).mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Watch:
    """Notes the indices of every forward pass of a training, and what it was called with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.visited: list[list[int]] = []
        self.items: list[Any] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            self.visited.append(inputs["index"].tolist())
            count = num_items_in_batch
            self.items.append(None if count is None else int(count))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Watched(Watch, MarginTrainer):
    """A MarginTrainer that notes its batches."""


class Stop(TrainerCallback):
    """Ends a training after some steps, as a crash would, without a save."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KeyboardInterrupt


def make(host: type, *args: Any, **kwargs: Any) -> Any:
    """A trainer that prints nothing."""
    trainer = host(*args, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def bare(folder: Any, *, dropout: float = 0.0, host: type = Trainer, **options: Any) -> Any:
    """A Trainer of Transformers alone, trained."""
    kwargs = {name: options.pop(name) for name in [*options] if name == "compute_loss_func"}
    trainer = make(
        host, network(dropout), arguments(folder, **options), train_dataset=texts(), **kwargs
    )
    trainer.train()
    return trainer


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss of the user: the sum over all samples of a step, by their number."""
    loss = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return loss / num_items_in_batch


def sampler(share: float = 0.4, **options: Any) -> MarginSampler:
    """A sampler of a share of the texts."""
    return MarginSampler(TrainingDynamics(SAMPLES), num_samples=round(share * SAMPLES), **options)


def joined(batches: Iterable[Iterable[int]]) -> list[int]:
    """The samples of several batches, in their order."""
    return [*itertools.chain.from_iterable(batches)]


def parameters(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def run_rank(groups: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Train on a rank of a gloo group that has begun already, or go on from a checkpoint."""
    import torch.distributed as dist

    rank, count = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "29511"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(**job)


def run(
    folder: str,
    *,
    checkpoint: str | None = None,
    stop: int | None = None,
    trainer_options: dict[str, Any] | None = None,
    data: int = SAMPLES,
    share: float | None = 0.4,
    dropout: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """Train, and return what happened as plain values."""
    order = None if share is None else sampler(share)
    given = {} if order is None else {"sampler": order}
    trainer = make(
        Watched,
        network(dropout),
        arguments(folder, **options),
        train_dataset=texts(data),
        # With its own loss DistilBERT has a mean of each batch, whatever the host multiplies.
        compute_loss_func=mean_loss,
        callbacks=[] if stop is None else [Stop(stop)],
        **given,
        **(trainer_options or {}),
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        assert stop is not None
    trainer.dynamics.sync()
    return {
        "visited": trainer.visited,
        "items": trainer.items,
        "parameters": parameters(trainer),
        "dynamics": trainer.dynamics.state_dict(),
        "steps": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "position": trainer.progress.position,
    }
