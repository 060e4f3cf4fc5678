"""Batches for TrainingDynamics, and comparisons of whole states."""

import torch

from helpers.rounding import assert_same

CLASSES = 4


def batches(samples, count, rows, seed=0):
    """``count`` batches with repetitions of a sample, ignored rows and a NaN now and then."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        indices = torch.randint(samples, (rows,), generator=random)
        logits = torch.randn(rows, CLASSES, generator=random) * 2
        if number % 3 == 1:
            logits[0, 0] = torch.nan
        target = torch.randint(CLASSES, (rows,), generator=random)
        target[torch.rand(rows, generator=random) < 0.1] = -100
        made.append((indices, logits, target))
    return made


def assert_same_dynamics(one, other):
    """The same state bit for bit, but for the row of the last visit."""
    own, theirs = one.state_dict(), other.state_dict()
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            assert_same(value, theirs[name])
        else:
            assert value == theirs[name], name
