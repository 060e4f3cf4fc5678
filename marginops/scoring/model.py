"""Runs a network of the user on the values of a column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..networks import call, evaluation_mode, output_tensor
from .head import Source, call_source, hash_tensors, place_of
from .tiles import OVERFLOW, kinds_of_values


class PlacedModel:
    """The network that a function returns, on a device."""

    def __init__(self, source: Source, device: torch.device) -> None:
        model = call_source("model", source)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected {place_of(source)} to return a torch.nn.Module, got "
                f"{type(model).__name__}"
            )
        self._model = model.to(device)
        self._device = device

    def sha256(self) -> str:
        """A hash of all parameters and buffers."""
        state = self._model.state_dict().items()
        return hash_tensors({name: value for name, value in state if isinstance(value, Tensor)})

    def logits(self, inputs: Tensor | list[Any], missing: Tensor | None) -> Tensor:
        """The logits ``[N, C]``, with zeros in missing rows. The network does not see these.

        At least one row is not missing.
        """
        rows, present = len(inputs), inputs
        kept = None if missing is None else (~missing).nonzero().flatten()
        if kept is not None:
            is_tensor = isinstance(inputs, Tensor)
            present = inputs[kept] if is_tensor else [inputs[row] for row in kept.tolist()]
        with evaluation_mode(self._model):
            if isinstance(present, Tensor):
                output = call(self._model, self._placed(present))
            else:  # one list of values, and no list of arguments
                output = self._model(present)
        logits = output_tensor(output)
        if len(logits) != len(present) or not logits.is_floating_point():
            raise ValueError(
                f"model: expected floating-point logits [{len(present)}, C], got "
                f"{list(logits.shape)} of {logits.dtype}"
            )
        if kept is None:
            return logits
        whole = logits.new_zeros(rows, logits.shape[1])
        whole[kept.to(logits.device)] = logits
        return whole

    def _placed(self, inputs: Tensor) -> Tensor:
        """A copy on the device. What is no integer gets the dtype of the network.

        The network may write into it, and its memory begins where that of each new tensor does.
        """
        dtype = inputs.dtype
        if inputs.is_floating_point():
            dtypes = (value.dtype for value in self._model.parameters())
            dtype = next((kind for kind in dtypes if kind.is_floating_point), torch.float32)
        return inputs.to(self._device, dtype, copy=True)


def judge_inputs(kinds: Tensor, inputs: Tensor | list[Any]) -> None:
    """Give rows whose logits are not finite the kind that follows from the inputs."""
    wrong = kinds.nonzero().flatten()
    if not len(wrong):
        return
    kinds[wrong] = OVERFLOW
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        values = inputs[wrong.to(inputs.device)].unsqueeze(1).flatten(1)
        kinds[wrong] = kinds_of_values(values.cpu(), OVERFLOW)
