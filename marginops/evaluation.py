"""Looking at a network without a trace of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network in evaluation mode, and every module back into its own mode at the end.

    Unlike ``network.eval()`` followed by ``network.train()``, layers that were frozen in
    evaluation mode stay frozen.

    Example:
        >>> import torch
        >>> from marginops.training import evaluation_mode
        >>> network = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout().eval())
        >>> with evaluation_mode(network):
        ...     [module.training for module in network]
        [False, False]
        >>> [module.training for module in network]
        [True, False]
    """
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()
        yield
    finally:
        for module in training:
            module.training = True
