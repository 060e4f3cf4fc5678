"""MarginCallback: dynamics, samplers, selection and records in a training by Lightning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from ..training import RunRecorder, SelectionSchedule, TrainingProgress, select_batch, take
from . import _lightning as host
from ._arguments import check_selection
from ._batch import BatchFields, Place

__all__ = ["MarginCallback"]

_Callback: Any = host.callback_class()


class MarginCallback(_Callback):  # type: ignore[misc]
    r"""Records what a training by Lightning sees of every sample, and decides what it visits next.

    It belongs to Lightning 2.6, both to ``lightning`` and to ``pytorch_lightning``. Import the one
    that you use before this module. The data set gives the id of each sample, for example by
    :class:`marginops.training.Indexed`, and ``training_step`` returns its logits:
    ``{"loss": loss, "logits": logits}``.

    Args:
        sampler: A sampler of :mod:`marginops.training` that the train loader uses too. Make it
            without ``group``, ``num_replicas`` and ``rank``: the callback tells it the ranks of the
            trainer. A sampler with ``shrink=True`` needs
            ``Trainer(reload_dataloaders_every_n_epochs=1)``.
        dynamics: The dynamics of a training whose loader has another sampler. They lie best on the
            device of the network.
        recorder: A :class:`marginops.training.RunRecorder`. Each epoch gets all numbers that
            ``self.log`` noted for callbacks.
        select: How many samples of each batch to train on: those that
            :func:`marginops.training.select_batch` selects. A batch that is not larger stays whole.
        schedule: The steps that select, by ``trainer.global_step``. Without ``select`` it also
            says how many samples of a batch stay.
        select_options: More arguments of :func:`marginops.training.select_batch`.
        inputs: Where a batch holds what the network takes, for ``select``: a key, a number or a
            function of the batch. The default is the first element of a tuple.
        target: Where a batch holds the classes. The default is the second element of a tuple, or
            the key target, targets, label, labels or y of a mapping.
        key: The key of the ids in batches that are mappings. In a tuple they come last.
        logits: The name of the logits in what ``training_step`` returns. None, if
            ``training_step`` calls ``callback.progress.update(ids, logits, target)`` itself. The
            result has ``mean_loss()``, which then replaces the loss of torch.
        fingerprint: A text that names the data set. A checkpoint with another one is refused; the
            number of samples is always compared.

    Attributes:
        progress: The :class:`marginops.training.TrainingProgress`, with the dynamics.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value. When the training starts:
            the loader does not use the sampler or has another number of samples, there are two such
            callbacks, or the checkpoint is one of another training.

    A checkpoint of the trainer has the state, and ``trainer.fit(..., ckpt_path=...)`` goes on with
    the next sample, within an epoch and also on another number of processes. Validation and sanity
    checks are not recorded. A step does not wait for the device, except the first one, in which the
    callback compares the ids with those of the sampler.

    With ``select``, the callback replaces ``on_after_batch_transfer`` of the module (or of the data
    module, if that defines it) during ``fit`` by one that calls it and then selects. The selection
    runs in the precision of the trainer.

    Example:
        >>> import torch
        >>> from lightning import LightningModule, Trainer
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from marginops.integrations.lightning import MarginCallback
        >>> from marginops.training import Indexed, MarginSampler, TrainingDynamics
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(8, 4)
        ...     def training_step(self, batch):
        ...         input, target, _ = batch
        ...         logits = self.layer(input)
        ...         loss = torch.nn.functional.cross_entropy(logits, target)
        ...         return {"loss": loss, "logits": logits}
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = TensorDataset(torch.randn(60, 8), torch.arange(60) % 4)
        >>> sampler = MarginSampler(TrainingDynamics(60), num_samples=20)
        >>> loader = DataLoader(Indexed(data), batch_size=10, sampler=sampler)
        >>> trainer = Trainer(
        ...     max_epochs=3,
        ...     accelerator="cpu",
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ...     callbacks=MarginCallback(sampler),
        ... )
        >>> trainer.fit(Model(), loader)
        >>> int(sampler.dynamics.count.sum())
        60
    """

    def __init__(
        self,
        sampler: Any = None,
        *,
        dynamics: Any = None,
        recorder: RunRecorder | None = None,
        select: int | None = None,
        schedule: SelectionSchedule | None = None,
        select_options: Mapping[str, Any] | None = None,
        inputs: Place | None = None,
        target: Place | None = None,
        key: Hashable = "index",
        logits: str | None = "logits",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        check_selection(select, schedule)
        self.progress = TrainingProgress(
            sampler, dynamics=dynamics, recorder=recorder, fingerprint=fingerprint
        )
        self._recorder = recorder
        self._select, self._schedule = select, schedule
        self._options = dict(select_options or {})
        self._fields = BatchFields(key, target, inputs)
        self._logits = logits
        self._fits = True
        self._resumed = self._ended_epoch = False
        self._checks_ids = False
        self._dropped = 0
        self._unrecorded: tuple[Any, int] | None = None
        self._hook_owner: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the sampler the ranks, and the module the selection."""
        self._fits = stage == "fit"
        if not self._fits:
            return
        sampler = self.progress.sampler
        host.check_trainer(trainer, MarginCallback, sampler, self.progress.dynamics)
        if sampler is not None:
            sampler.set_ranks(trainer.world_size, trainer.global_rank)
        self._resumed = self._ended_epoch = False
        self._dropped = 0
        if self._select is not None or self._schedule is not None:
            self._wrap_transfer(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint to resume from has the state of this callback."""
        if not self._fits:
            return
        if self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f"ckpt_path: expected a checkpoint with a state of {self.state_key}, got one with "
                f"those of {', '.join(checkpoint['callbacks']) or 'no callbacks'}; load only the "
                "weights of a training without it"
            )
        self._ended_epoch = host.begins_next_epoch(checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """The state of the progress. A collective call, as Lightning makes it."""
        self._record_epoch()
        return self.progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a state was made. Validation and test leave the state alone."""
        if not self._fits:
            return
        self.progress.load_state_dict(state_dict)
        self._resumed = True
        epoch = self.progress.epoch
        if self._ended_epoch and self._recorder is not None:
            self._recorder.end_epoch(epoch)
        self.progress.begin_epoch(epoch + self._ended_epoch)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the first epoch ready, whose iterator exists before the epoch starts."""
        if not self._resumed:
            self.progress.begin_epoch(trainer.current_epoch)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the loader, and let the loop count its batches from the position on."""
        sampler = self.progress.sampler
        loader = host.train_loader(trainer, sampler, self.progress.dynamics.num_samples)
        self._checks_ids = sampler is not None and host.is_plain(loader)
        if sampler is not None and self._resumed:
            # A loader with a state of its own resumed too, and set the sampler to the beginning.
            sampler.load_state_dict(sampler.state_dict(self.progress.position))
            left = 0 if self._ended_epoch else host.batches_left(loader, sampler)
            if left is not None:
                host.set_batches_done(trainer, len(loader) - left)
            # The sampler resumes, which Lightning cannot see.
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Record the epoch before."""
        self._record_epoch()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record a batch."""
        if self._checks_ids:
            self._check_ids(batch)
        if self._logits is not None:
            self._record(pl_module, outputs, batch)
        if self._dropped:
            self.progress.advance(self._dropped)
            self._dropped = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Make the next epoch ready."""
        if self._logits is None and self.progress.position == 0:
            raise ValueError(
                "progress: expected calls of callback.progress.update in training_step with "
                "logits=None, got none"
            )
        epoch = self.progress.epoch
        if self._recorder is not None:
            self._unrecorded = trainer, epoch
        self.progress.begin_epoch(epoch + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the last epoch."""
        self._record_epoch()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the module its own hook back."""
        self._unwrap_transfer()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the module its own hook back."""
        self._unwrap_transfer()

    def _record(self, module: Any, outputs: Any, batch: Any) -> None:
        ids = self._fields.ids(batch)
        outputs = outputs if isinstance(outputs, Mapping) else {}
        if self._logits in outputs:
            logits = outputs[self._logits].detach()
            self.progress.update(ids, logits, self._fields.target(batch))
        elif not outputs and module.automatic_optimization:  # the module left out this step
            self.progress.advance(ids.numel())
        else:
            raise ValueError(
                f"training_step: expected {self._logits!r} in the dict that it returns, got "
                f"{', '.join(map(repr, outputs)) or 'nothing'}; return "
                f'{{"loss": loss, "{self._logits}": logits}}, or call callback.progress.update in '
                "it and pass logits=None"
            )

    def _check_ids(self, batch: Any) -> None:
        """Check that what the first batch has for ids are the first ids of the sampler."""
        self._checks_ids = False
        ids = self._fields.ids(batch)
        expected = self.progress.sampler.indices()[: ids.numel() + self._dropped]  # type: ignore[union-attr]
        if not torch.isin(ids.cpu(), expected).all():
            raise ValueError(
                f"batch: expected the ids {expected[:4].tolist()} ... of the sampler, got "
                f"{ids[:4].tolist()} ...; wrap the data set: Indexed(dataset)"
            )

    def _record_epoch(self) -> None:
        """Give the recorder the epoch, when also the module logged its numbers of the epoch."""
        if self._unrecorded is None or self._recorder is None:
            return
        (trainer, epoch), self._unrecorded = self._unrecorded, None
        arguments = "epoch", "report"  # of end_epoch, which a module may log too
        values: dict[str, Any] = {
            f"logged_{name}" if name in arguments else name: float(value)
            for name, value in trainer.callback_metrics.items()
        }
        self._recorder.end_epoch(epoch, **values)

    def _wrap_transfer(self, trainer: Any, module: Any) -> None:
        name = "on_after_batch_transfer"
        data = trainer.datamodule
        owner = data if data is not None and host.defines(data, name) else module
        hook = getattr(owner, name)

        @functools.wraps(hook)
        def transfer(batch: Any, dataloader_idx: int) -> Any:
            return self._selected(trainer, module, hook(batch, dataloader_idx))

        setattr(owner, name, transfer)
        self._hook_owner = owner

    def _unwrap_transfer(self) -> None:
        if self._hook_owner is not None:
            del self._hook_owner.on_after_batch_transfer
            self._hook_owner = None

    def _selected(self, trainer: Any, module: Any, batch: Any) -> Any:
        """The samples of a batch to train on."""
        if not trainer.training:  # sanity checks and validation
            return batch
        count, step = self._fields.ids(batch).numel(), trainer.global_step
        active = self._schedule is None or self._schedule.is_active(step)
        k = self._select
        if k is None and self._schedule is not None:
            k = self._schedule.num_kept(step, count)
        if not active or k is None or k >= count:
            return batch
        with trainer.precision_plugin.forward_context():
            chosen = select_batch(module, self._fields.inputs(batch), k, **self._options)
        self._dropped = count - k
        return take(batch, chosen)
