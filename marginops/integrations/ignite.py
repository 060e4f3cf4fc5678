"""ProgressHandler: dynamics and samplers in a training by PyTorch-Ignite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..training import TrainingProgress
from ._arguments import check_progress
from ._hosts import check_host

check_host("pytorch-ignite", "0.5", "0.6", "pytorch-ignite")
from ignite.engine import Engine, Events  # noqa: E402

__all__ = ["ProgressHandler"]
_BatchOf = Callable[[Any], tuple[Tensor, Tensor, Tensor]]


class ProgressHandler:
    """Begins the epochs of a :class:`marginops.training.TrainingProgress` in an Ignite engine.

    Args:
        progress: The progress, whose sampler the loader uses. ``Checkpoint({"engine": engine,
            "progress": progress, ...})`` of Ignite saves it, on all ranks.
        batch_of: A function of ``engine.state.output`` that returns the ids, logits and targets of
            a step. None, if the step itself calls ``progress.update``, which also gives its loss.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: While the engine runs: it asks for more batches than an epoch has.
    """

    def __init__(self, progress: TrainingProgress, batch_of: _BatchOf | None = None) -> None:
        check_progress(progress, batch_of)
        self.progress, self.batch_of = progress, batch_of

    def attach(self, engine: Engine) -> None:
        """Add the handlers to an engine, before a ``Checkpoint``."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note)
        engine.add_event_handler(Events.DATALOADER_STOP_ITERATION, self._check_end)

    def _begin(self, engine: Engine) -> None:
        self.progress.begin_epoch(engine.state.epoch - 1)

    def _note(self, engine: Engine) -> None:
        if self.batch_of is not None:
            ids, logits, target = self.batch_of(engine.state.output)
            self.progress.update(ids, logits.detach(), target)

    def _check_end(self, engine: Engine) -> None:
        rest = -engine.state.iteration % (engine.state.epoch_length or 1)
        if rest:
            raise ValueError(
                f"epoch_length: expected no more batches in this epoch, got {rest} to go; run the "
                "engine with epoch_length=len(loader), batch size and ranks as before"
            )
