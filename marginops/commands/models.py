"""The networks of the commands: the built-in one, and that of ``--model MODULE:FUNCTION``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..networks import call, evaluation_mode, features_and_logits, last_linear, output_tensor
from ..norms import log_norm_product
from ..training.selection.head_kinds import check_head_type
from ..training.selection.heads import check_head
from . import functions
from .data import ClassificationData
from .options import UsageError

# As many samples as show whether the logits follow from the last layer.
_TRIED = 64


@dataclass(frozen=True, eq=False)
class Model:
    """A network for the data of a command.

    Attributes:
        network: Maps inputs ``[B, ...]`` to logits ``[B, C]``, see
            :func:`marginops.networks.output_tensor`.
        head: The layer of ``network`` that computes the logits.
        is_own: Whether the network comes from a function of the user.
    """

    network: nn.Module
    head: nn.Linear
    is_own: bool

    def told(self) -> AbstractContextManager[None]:
        """A context that tells an error of the user's network as a UsageError."""
        return functions.told("--model", "the network") if self.is_own else nullcontext()

    def logits_and_features(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of a batch, and the input of the head that they follow from."""
        features: list[Tensor] = []

        def save(_: Any, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            features.extend((*given, *named.values()))

        hook = self.head.register_forward_pre_hook(save, with_kwargs=True)
        try:
            with self.told():
                return output_tensor(call(self.network, inputs)), features[0]
        finally:
            hook.remove()

    def norm_problem(self, inputs: Tensor) -> str | None:
        """Why the product of the layers' norms is not defined; None if it is."""
        try:
            log_norm_product(self.network, example_input=inputs[:2])
        except (TypeError, ValueError) as error:
            return first_line(error)
        return None


def build(data: ClassificationData, options: argparse.Namespace) -> Model:
    """The network that the options name, on their device, with new random weights.

    Raises:
        UsageError: The user's function cannot be found or called, or it returned no network that
            maps the inputs of the data to logits for its classes.
    """
    if options.model is None:
        built_in = mlp(data, options.hidden).to(options.device)
        last = built_in[-1]
        assert isinstance(last, nn.Linear)
        return Model(built_in, last, is_own=False)
    value = functions.call("--model", options.model, num_classes=data.num_classes)
    network, head = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"--model: expected {options.model} to return a torch.nn.Module, or a pair of it and "
            f"its last layer, got {type(network).__name__}"
        )
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError(
            f"--model: expected {options.model} to return a network with parameters to train, got "
            f"{type(network).__name__} without any"
        )
    network = network.to(options.device)
    return Model(network, _checked_head(network, head, data), is_own=True)


def mlp(data: ClassificationData, hidden: Sequence[int]) -> nn.Sequential:
    """A network of linear layers with biases and ReLU, for the inputs and classes of the data."""
    width, *others = widths(data, hidden)
    layers: list[nn.Module] = [nn.Flatten()]
    for next_width in others:
        layers += [nn.Linear(width, next_width), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers[:-1])


def widths(data: ClassificationData, hidden: Sequence[int]) -> list[int]:
    """The widths of all layers of the built-in network, from the inputs to the classes."""
    return [data.train_inputs[0].numel(), *hidden, data.num_classes]


def _checked_head(network: nn.Module, head: Any, data: ClassificationData) -> nn.Linear:
    """The layer that computes the logits. A trial shows whether the network fits the data."""
    inputs = data.train_inputs[:_TRIED]
    with functions.told("--model", "the network"), evaluation_mode(network), torch.no_grad():
        output = call(network, inputs)
    try:
        logits = output_tensor(output)
        expected = [len(inputs), data.num_classes]
        if [*logits.shape] != expected or not logits.is_floating_point():
            raise ValueError(
                f"network: expected floating-point logits of shape {expected} for {len(inputs)} "
                f"inputs and {data.num_classes} classes, got {logits.dtype} of shape "
                f"{[*logits.shape]}"
            )
        check_head_type(head)
        layer: nn.Linear = last_linear(network, data.num_classes) if head is None else head
        features_and_logits(network, inputs, layer)
        check_head(network, inputs, layer)
        return layer
    except (TypeError, ValueError) as error:
        problem = first_line(error).partition("; ")[0]
        raise UsageError(
            f"--model: {problem}; return a network whose last layer, a torch.nn.Linear, computes "
            "the logits [B, C] from features [B, D], or a pair of the network and this layer"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of the message of an error."""
    return str(error).partition("\n")[0]
