"""MarginTrainer: the Trainer of Transformers with training dynamics, samplers and selection."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..networks import output_tensor
from ..training import (
    MarginSampler,
    ReductionSampler,
    RunRecorder,
    SelectionSchedule,
    TrainingDynamics,
    TrainingProgress,
    WeightedSampler,
    batch_size,
    select_batch,
    take,
)
from ..training.samplers.dynamics_sampler import DynamicsSampler
from ._arguments import check_selection, warn_of_waiting
from ._hosts import check_host

_INSTALL = "transformers>=4.57 accelerate"
check_host("transformers", "4.57", "6", _INSTALL)
check_host("accelerate", "1", "2", _INSTALL)

from transformers import Trainer, TrainerCallback  # noqa: E402 - only if it fits
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402

from ._transformers_batches import Numbered  # noqa: E402
from ._transformers_checkpoint import load_state, save_state  # noqa: E402
from ._transformers_checks import check_data, check_hooks, check_sampler  # noqa: E402
from ._transformers_loader import labels_checksum, training_loader  # noqa: E402

check_hooks(Trainer)

__all__ = ["MarginTrainer"]


class MarginTrainer(Trainer):  # type: ignore[misc]
    r"""A ``transformers.Trainer`` that knows its samples.

    It keeps the index of each sample through the collator and notes in
    :class:`marginops.training.TrainingDynamics` what each training step saw. It may draw the epochs
    with one of our samplers, and it may train on the closest samples of each batch only. Loss,
    optimiser, logging and evaluation stay those of the host.

    As the first base of a class it does the same for another trainer:
    ``class MarginSFTTrainer(MarginTrainer, SFTTrainer): ...``.

    Args:
        *args: The arguments of the host.
        sampler: A sampler of :mod:`marginops.training` without ``group``, which draws the epochs.
            The trainer begins its epochs and shares each order among the processes. An epoch of
            ``num_train_epochs`` has ``len(sampler)`` samples.
        dynamics: The dynamics, for a training without ``sampler``. By default the trainer makes
            them on the device of the training.
        recorder: A :class:`marginops.training.RunRecorder` of these dynamics, which writes the
            folder for a report.
        fingerprint: A text that names the data set. The checkpoints of a data set with another one
            are refused. The default is a checksum of 32 labels.
        select: k, how many samples of each batch to train on, by
            :func:`marginops.training.select_batch`. The batch size of ``args`` is then the number
            of candidates. A batch of at most k samples is trained as a whole.
        schedule: The steps of the optimiser that select. Without ``select`` the schedule also says
            how many samples of a batch to train on.
        select_options: More arguments of :func:`marginops.training.select_batch`.
        key: The name under which a training batch holds the indices.
        **kwargs: More arguments of the host.

    Attributes:
        progress: :class:`marginops.training.TrainingProgress`: dynamics, sampler, epoch, position.
        dynamics: ``progress.dynamics``.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value, the data set has no length,
            or sampler and dynamics are of another number of samples.

    The trainer saves its state as ``marginops.pt`` in each checkpoint, and
    ``train(resume_from_checkpoint=...)`` goes on from there. The number of processes may change if
    processes x ``per_device_train_batch_size`` x ``gradient_accumulation_steps`` stays the same.

    A step without selection adds the statistics of the batch, and waits for no device if the
    dynamics are on the device of the training. Statistics are those of the logits and labels
    alone, also with label smoothing or ``compute_loss_func``.

    Example:
        >>> import tempfile
        >>> from transformers import DistilBertConfig, DistilBertForSequenceClassification
        >>> from transformers import TrainingArguments
        >>> from marginops.integrations.transformers import MarginTrainer
        >>> from marginops.training import MarginSampler, TrainingDynamics
        >>> config = DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
        >>> data = [{"input_ids": [1 + i % 2, 3, 4], "labels": i % 2} for i in range(20)]
        >>> args = TrainingArguments(
        ...     tempfile.mkdtemp(), num_train_epochs=3, report_to="none", disable_tqdm=True
        ... )
        >>> trainer = MarginTrainer(
        ...     DistilBertForSequenceClassification(config), args, train_dataset=data,
        ...     sampler=MarginSampler(TrainingDynamics(len(data)), num_samples=10),
        ... )
        >>> trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...
        6
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(MarginTrainer)]:
            if issubclass(base, Trainer) and not issubclass(base, MarginTrainer):
                raise TypeError(
                    f"{cls.__name__}: expected MarginTrainer as the first base, got "
                    f"{base.__name__} before it; write class {cls.__name__}(MarginTrainer, "
                    f"{base.__name__})"
                )
        host = cls.__mro__[cls.__mro__.index(MarginTrainer) + 1]
        check_hooks(host)
        if getattr(host, "get_train_dataloader", None) is not Trainer.get_train_dataloader:
            raise TypeError(
                f"{cls.__name__}: expected a host with the get_train_dataloader of "
                f"transformers.Trainer, got {host.__name__}, whose own one MarginTrainer cannot "
                "keep"
            )

    def __init__(
        self,
        *args: Any,
        sampler: MarginSampler | ReductionSampler | WeightedSampler | None = None,
        dynamics: TrainingDynamics | None = None,
        recorder: RunRecorder | None = None,
        fingerprint: str | None = None,
        select: int | None = None,
        schedule: SelectionSchedule | None = None,
        select_options: Mapping[str, Any] | None = None,
        key: str = "index",
        **kwargs: Any,
    ) -> None:
        check_sampler(sampler)
        check_selection(select, schedule)
        if not isinstance(key, str):
            raise TypeError(f"key: expected a str, got {type(key).__name__}")
        super().__init__(*args, **kwargs)
        self._select, self._schedule, self._key = select, schedule, key
        self._fingerprint = fingerprint
        self._select_options = dict(select_options or {})
        if dynamics is None and recorder is None and not hasattr(sampler, "dynamics"):
            size = len(Numbered(self.train_dataset))
            dynamics = TrainingDynamics(size, device=self.args.device)
        self.progress = TrainingProgress(
            sampler, dynamics=dynamics, recorder=recorder, fingerprint=fingerprint
        )
        self.recorder, self.dynamics = recorder, self.progress.dynamics
        self._next_epoch, self._is_in_epoch = 0, False
        if self.train_dataset is not None:
            check_data(self)
        warn_of_waiting(self.dynamics, self.args.device)
        self.add_callback(_Epochs(self))

    def logits_and_target(self, inputs: Mapping[str, Any], outputs: Any) -> tuple[Tensor, Tensor]:
        """What the dynamics note of a batch. Override it for other outputs.

        Args:
            inputs: The batch as the model got it, with its labels.
            outputs: What the model returned.

        Returns:
            Logits ``[B, C]`` and targets ``[B]``, one row for each sample.
        """
        if len(self.label_names) != 1 or self.label_names[0] not in inputs:
            raise ValueError(
                f"inputs: expected one label for each sample under the name {self.label_names}, "
                f"got the keys {[*inputs]}; override logits_and_target"
            )
        logits = getattr(outputs, "logits", None)
        if isinstance(logits, Tensor) and logits.dim() > 2:
            raise ValueError(
                f"logits: expected shape [B, C], one row for each sample, got "
                f"{list(logits.shape)}, as of a model of tokens; override logits_and_target to "
                "choose one position of each sample, or train without MarginTrainer and call "
                "marginops.sample_statistics on the tokens"
            )
        return output_tensor(outputs), inputs[self.label_names[0]]

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of the host. In training the dynamics note the batch."""
        batch = {**inputs}
        if not model.training:  # an evaluation, whose batches have no indices
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        indices = self._take_indices(batch)
        loss, outputs = super().compute_loss(model, {**batch}, True, num_items_in_batch)
        logits, target = self.logits_and_target(batch, outputs)
        self.progress.update(indices, logits.detach(), target)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """The batches of a step as the host takes them, of which selection leaves the closest."""
        if self._select is not None or self._schedule is not None:
            epoch_iterator = map(self._closest, epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _closest(self, candidates: Mapping[str, Any]) -> Any:
        """The samples of a batch to train on."""
        batch = {**candidates}
        count = len(self._take_indices(batch))
        k, step = self._select, self.state.global_step
        if self._schedule is not None:
            if not self._schedule.is_active(step):
                return candidates
            k = self._schedule.num_kept(step, count) if k is None else k
        if k is None or k >= count:
            return candidates
        inputs = {name: part for name, part in batch.items() if name not in self.label_names}
        if batch_size(inputs) != count:
            raise ValueError(
                f"select: expected one row for each of {count} samples in a batch, got "
                f"{batch_size(inputs)} rows; use a data_collator that does not join samples"
            )
        with self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            chosen = select_batch(self.model, inputs, k, **self._select_options)
        self.progress.advance(count - k)
        return take(candidates, chosen)

    def _take_indices(self, batch: dict[str, Any]) -> Tensor:
        """The indices of a training batch, which are taken out of it."""
        if self._key not in batch:
            raise ValueError(
                f"{self._key}: expected the indices of the samples in a training batch, got the "
                f"keys {[*batch]}; leave get_train_dataloader as it is in MarginTrainer"
            )
        return batch.pop(self._key)

    def get_train_dataloader(self) -> Any:
        """The loader of the host, with indices in its batches and the order of our sampler."""
        check_data(self)
        loader = training_loader(self, self.progress.sampler, self._key)
        prepared = self.accelerator.prepare(loader)
        self._batches_per_epoch = len(prepared)
        return prepared

    def num_examples(self, dataloader: Any) -> int:
        """How many samples an epoch visits."""
        is_ours = isinstance(getattr(dataloader, "dataset", None), Numbered)
        if is_ours and self.progress.sampler is not None:
            return self.progress.sampler.epoch_size
        return super().num_examples(dataloader)

    def _begin_epoch(self) -> None:
        self.progress.begin_epoch(self._next_epoch)
        self._next_epoch += 1
        self._is_in_epoch = True

    def _end_epoch(self) -> None:
        if self.recorder is not None and self._is_in_epoch:
            self.recorder.end_epoch(self.progress.epoch)
        self._is_in_epoch = False

    def _steps_per_epoch(self) -> int:
        return math.ceil(self._batches_per_epoch / self.args.gradient_accumulation_steps)

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Begin anew or at the state of a checkpoint, and run the loop of the host."""
        self._next_epoch, sampler = 0, self.progress.sampler
        own = self._fingerprint
        self.progress.fingerprint = labels_checksum(self, self._key) if own is None else own
        if resume_from_checkpoint is not None:
            load_state(self.progress, resume_from_checkpoint)
            if not self.args.auto_find_batch_size:
                # Transformers 4 takes that of the checkpoint, whatever the arguments say.
                batch_size = self._train_batch_size = self.args.train_batch_size
        elif sampler is not None:
            if isinstance(sampler, DynamicsSampler):
                self.dynamics.weights_version = -1
            sampler.load_state_dict({**sampler.state_dict(0), "epoch": 0})
        return super()._inner_training_loop(
            batch_size=batch_size,
            args=args,
            resume_from_checkpoint=resume_from_checkpoint,
            **kwargs,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write our state before the files of the host, so that no checkpoint is without it."""
        if self.state.global_step % self._steps_per_epoch() == 0:
            self._end_epoch()  # the host ends the epoch after this save
        state = self.progress.state_dict()
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_state(state, os.path.join(self._get_output_dir(trial=trial), name))
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """Check that the host goes on where our state stopped. The host has just read its own."""
        super()._load_callback_state()
        accumulation = self.args.gradient_accumulation_steps
        epoch, step = divmod(self.state.global_step, self._steps_per_epoch())
        self._next_epoch = epoch
        if self.progress.sampler is None:
            return
        size = self.args.world_size * self._train_batch_size
        own = self.progress.epoch, self.progress.position
        if own[1] >= min(self.progress.sampler.epoch_size, self._batches_per_epoch * size):
            own = own[0] + 1, 0
        if own != (epoch, step * accumulation * size):
            raise ValueError(
                f"resume_from_checkpoint: expected step {self.state.global_step} at sample "
                f"{own[1]} of epoch {own[0]}, got sample {step * accumulation * size} of epoch "
                f"{epoch}; keep processes x per_device_train_batch_size x "
                f"gradient_accumulation_steps, now {size * accumulation}, as they were"
            )


class _Epochs(TrainerCallback):  # type: ignore[misc]
    """Tells a trainer where its epochs begin and end."""

    def __init__(self, trainer: MarginTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._begin_epoch()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._end_epoch()
