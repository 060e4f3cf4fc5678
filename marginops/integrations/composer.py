"""ProgressAlgorithm: dynamics and samplers in a training by Composer of MosaicML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..training import TrainingProgress

_BEGIN = "fit_start", "epoch_start"  # a fit that resumes within an epoch has no start of it


class ProgressAlgorithm:
    """An algorithm of Composer that notes every batch in a ``TrainingProgress``.

    Pass it as ``Trainer(algorithms=..., spin_dataloaders=False)``: the sampler itself begins at the
    position of a loaded state, so Composer must not skip the batches once more.

    Args:
        progress: The :class:`marginops.training.TrainingProgress`, whose sampler the loader uses.
        batch_of: A function of ``state.batch`` and ``state.outputs`` that returns the ids, logits
            and targets. The default takes a batch ``(inputs, target, ids)``, and outputs that are
            logits.

    Raises:
        TypeError: An argument has the wrong type.

    It needs no import of Composer, whose algorithms are any objects with its methods.
    """

    find_unused_parameters = backwards_create_graph = False

    def __init__(
        self,
        progress: TrainingProgress,
        batch_of: Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]] | None = None,
    ) -> None:
        if not isinstance(progress, TrainingProgress):
            raise TypeError(f"progress: expected TrainingProgress, got {type(progress).__name__}")
        if batch_of is not None and not callable(batch_of):
            raise TypeError(f"batch_of: expected a function, got {type(batch_of).__name__}")
        self.progress = progress
        self._batch_of = batch_of or (lambda batch, outputs: (batch[2], outputs, batch[1]))

    def match(self, event: Any, state: Any) -> bool:
        """Whether the event is the beginning of an epoch or the end of a forward pass."""
        return event.value in (*_BEGIN, "after_forward")

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Begin an epoch, or note a batch."""
        if event.value in _BEGIN:
            self.progress.begin_epoch(int(state.timestamp.epoch))
        else:
            ids, logits, target = self._batch_of(state.batch, state.outputs)
            self.progress.update(ids, logits.detach(), target)

    def state_dict(self) -> dict[str, Any]:
        """The state of the progress. Composer calls it on all ranks."""
        return self.progress.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the progress."""
        self.progress.load_state_dict(state)
