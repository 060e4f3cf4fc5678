"""A MarginTrainer of Transformers."""

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from marginops.integrations.transformers import MarginTrainer

from .run import EPOCHS, Run, make_data, make_network, make_sampler


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = make_network()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class _Trainer(MarginTrainer):
    run: Run

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.run.note(inputs["index"])
        return super().compute_loss(model, inputs, *args, **kwargs)


class _Save(TrainerCallback):
    """Saves after one step. The interval of a Trainer is that of the checkpoint it resumes from."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == self.run.save_at


def train(run: Run) -> None:
    arguments = TrainingArguments(
        **{"output_dir": str(run.folder), "use_cpu": True, "report_to": "none"},
        **{"disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False},
        **{"optim": "sgd", "learning_rate": 0.2, "lr_scheduler_type": "constant"},
        **{"max_grad_norm": 0.0, "num_train_epochs": EPOCHS},
        **{"per_device_train_batch_size": run.batch_size, "save_strategy": "no"},
    )
    items = [{"inputs": inputs, "labels": target} for inputs, target in make_data()]
    trainer = _Trainer(
        _Network(),
        arguments,
        train_dataset=items,
        sampler=make_sampler(),
        callbacks=[_Save(run)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.run = run
    resume = None
    if run.resume is not None:
        resume = str(run.resume[0] / f"checkpoint-{run.resume[1]}")
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == run.step
