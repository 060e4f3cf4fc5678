"""ProgressAlgorithm: dynamics and samplers in a training by Composer of MosaicML."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..training import TrainingProgress
from ._arguments import check_progress

__all__ = ["ProgressAlgorithm"]
_BatchOf = Callable[[Any, Any], tuple[Tensor, Tensor, Tensor]]


class ProgressAlgorithm:
    """An algorithm of Composer that notes every batch in a ``TrainingProgress``.

    Pass it as ``Trainer(algorithms=..., spin_dataloaders=False)``. The sampler itself begins at the
    position of a loaded state.

    Args:
        progress: The :class:`marginops.training.TrainingProgress`, whose sampler the loader uses.
        batch_of: A function of ``state.batch`` and ``state.outputs`` that returns the ids, logits
            and targets. The default takes batches ``(inputs, target, ids)`` and outputs = logits.

    Raises:
        TypeError: An argument has the wrong type.
    """

    find_unused_parameters = backwards_create_graph = False

    def __init__(self, progress: TrainingProgress, batch_of: _BatchOf | None = None) -> None:
        check_progress(progress, batch_of)
        self.progress = progress
        self._batch_of = batch_of or (lambda batch, outputs: (batch[2], outputs, batch[1]))

    def match(self, event: Any, state: Any) -> bool:
        """Whether an epoch begins or a forward pass ends."""
        return event.value in ("epoch_start", "after_forward")

    def apply(self, event: Any, state: Any, logger: Any) -> None:
        """Begin an epoch, or note a batch."""
        if event.value == "epoch_start":
            self.progress.begin_epoch(int(state.timestamp.epoch))
        else:
            ids, logits, target = self._batch_of(state.batch, state.outputs)
            self.progress.update(ids, logits.detach(), target)

    def state_dict(self) -> dict[str, Any]:
        """The state of the progress, on all ranks."""
        return self.progress.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of the progress."""
        self.progress.load_state_dict(state)
