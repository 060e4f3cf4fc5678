"""Parts of training loops that several claims share."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def uniform_batches(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of full batches without end; every epoch has an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from full_batches(torch.randperm(size, generator=generator), batch_size)


def full_batches(order: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Batches of an epoch. Incomplete ones are left out, unless there are no others."""
    for indices in order.split(batch_size):
        if len(indices) == batch_size or len(order) < batch_size:
            yield indices


def warm_up_and_cosine(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the largest.

    It rises over the first tenth of the steps, and falls to 0 at the last as a cosine.
    """
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def logits_of(network: nn.Module, inputs: Tensor, batch_size: int = 2000) -> Tensor:
    """The logits of all samples in evaluation mode. The mode stays as it was."""
    was_training = network.training
    network.eval()
    logits = torch.cat([network(batch) for batch in inputs.split(batch_size)])
    network.train(was_training)
    return logits


def error_of(network: nn.Module, inputs: Tensor, target: Tensor) -> float:
    """The share of samples whose largest logit is not that of their label."""
    return (logits_of(network, inputs).argmax(1) != target).double().mean().item()
