"""The state of a training as a file in the checkpoint of a host."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..training import TrainingProgress

_FILE = "marginops.pt"


def save_state(state: Mapping[str, Any], checkpoint: str) -> None:
    """Write the state of a :class:`marginops.training.TrainingProgress`, as a whole or not."""
    os.makedirs(checkpoint, exist_ok=True)
    path = os.path.join(checkpoint, _FILE)
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)


def load_state(progress: TrainingProgress, checkpoint: str) -> None:
    """Restore a state. If it does not fit, everything stays as it was."""
    path = os.path.join(checkpoint, _FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"resume_from_checkpoint: expected a checkpoint with the file {_FILE}, got "
            f"{checkpoint} without it; go on with the trainer that wrote it, or begin anew"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        had_sampler, has_sampler = state["sampler"] is not None, progress.sampler is not None
        if had_sampler != has_sampler:
            words = {True: "with", False: "without"}
            raise ValueError(
                f"it is of a training {words[had_sampler]} sampler=, and this training is "
                f"{words[has_sampler]} it"
            )
        progress.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"resume_from_checkpoint: expected the state of this training in {path}, got another "
            f"one: {error}"
        ) from error
