"""Measure what our part adds to a training step of a trainer: steps of about 10 ms.

python benchmarks/claims/host_overhead.py --host lightning     # about two minutes
python benchmarks/claims/host_overhead.py --host transformers

One training is bare: the trainer, a shuffled loader and F.cross_entropy. The other has a
MarginSampler and the adapter, whose work between epochs is part of the time. They take turns. The
times are CPU times on one thread, without the start of a training. What our part adds is the
difference of the fastest rounds, because other programs make rounds slower and never faster. It
does not depend on the network: on a busy machine measure it with a small one, --width 16.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from marginops.training import Indexed, MarginSampler, TrainingDynamics

SAMPLES, BATCH, CLASSES, EPOCHS = 6_400, 64, 10, 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=HOSTS, required=True, help="the trainer")
    parser.add_argument("--rounds", type=int, default=11, help="trainings of each kind (11)")
    parser.add_argument("--width", type=int, default=1024, help="units of the network (1024)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train = HOSTS[options.host]
    pairs = [
        (train(False, options.width), train(True, options.width)) for _ in range(options.rounds)
    ]
    bare = min(plain for plain, _ in pairs)
    ratios = sorted(ours / plain for plain, ours in pairs)
    added = min(ours for _, ours in pairs) - min(plain for plain, _ in pairs)
    print(f"bare step of {options.host}: {1000 * bare:.2f} ms")
    print(f"our part adds {1e6 * added:.0f} us a step, {added / 1e-4:.1f} % of a step of 10 ms")
    print(
        f"step with our part: {statistics.median(ratios):.3f} times "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} rounds)"
    )


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 784, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator))


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def loaders(ours: bool) -> tuple[DataLoader, MarginSampler | None]:
    dataset: Dataset = data()
    if not ours:
        return DataLoader(dataset, BATCH, shuffle=True), None
    sampler = MarginSampler(TrainingDynamics(SAMPLES), num_samples=SAMPLES)
    return DataLoader(Indexed(dataset), BATCH, sampler=sampler), sampler


def lightning_step(ours: bool, width: int) -> float:
    """CPU seconds of a step of Lightning."""
    import lightning

    from marginops.integrations.lightning import MarginCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(width)

        def training_step(self, batch: tuple) -> dict[str, torch.Tensor]:
            logits = self.network(batch[0])
            return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Watch(lightning.Callback):
        def on_train_start(self, *_: object) -> None:
            self.start = time.process_time()

        def on_train_end(self, *_: object) -> None:
            self.seconds = time.process_time() - self.start

    loader, sampler = loaders(ours)
    watch = Watch()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tempfile.gettempdir(),
        callbacks=[watch, *([] if sampler is None else [MarginCallback(sampler)])],
    )
    trainer.fit(Model(), loader)
    return watch.seconds / trainer.global_step


def transformers_step(ours: bool, width: int) -> float:
    """CPU seconds of a step of the Trainer of Transformers."""
    import transformers

    from marginops.integrations.transformers import MarginTrainer

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(width)

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.network(inputs)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            self.start = time.process_time()

        def on_train_end(self, *_: object, **__: object) -> None:
            self.seconds = time.process_time() - self.start

    def collate(items: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        inputs, labels = zip(*items, strict=True)
        return {"inputs": torch.stack(inputs), "labels": torch.stack(labels)}

    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=0.01,
        optim="sgd",
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    sampler = MarginSampler(TrainingDynamics(SAMPLES), num_samples=SAMPLES)
    watch = Watch()
    trainer = (MarginTrainer if ours else transformers.Trainer)(
        Model(),
        arguments,
        train_dataset=data(),
        data_collator=collate,
        callbacks=[watch],
        **({"sampler": sampler} if ours else {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return watch.seconds / trainer.state.global_step


HOSTS: dict[str, Callable[[bool, int], float]] = {
    "lightning": lightning_step,
    "transformers": transformers_step,
}


if __name__ == "__main__":
    main()
