"""One training run of ``train_faster.py``. Both samplings share every line but two."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tasks import UNIFORM, Data, Task
from torch import Tensor, nn

from marginops.training import MarginSampler, Stopwatch, TrainingDynamics

BATCH = 128


def train(
    task: Task, data: Data, sampling: str, budget: float, seed: int, stopwatch: Stopwatch
) -> tuple[float, int]:
    """Train a new network; return its test accuracy after the last step and the samples it took.

    SGD with Nesterov momentum 0.9 and weight decay 5e-4. The learning rate rises over the first
    tenth of the steps, and falls to 0 at the last step as a cosine.
    """
    torch.manual_seed(seed)
    network = task.network(data)
    size = len(data.train_target)
    steps = max(1, round(budget * size / BATCH))
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=task.learning_rates[sampling][budget],
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    with stopwatch:
        dynamics = None if sampling == UNIFORM else TrainingDynamics(size)
        if dynamics is None:
            batches = _uniform_batches(size, seed)
        else:
            batches = _margin_batches(MarginSampler(dynamics, task.policies[budget], seed=seed))
        samples = 0
        for _, indices in zip(range(steps), batches, strict=False):
            target = data.train_target[indices]
            logits = network(data.train_inputs[indices])
            if dynamics is None:
                loss = F.cross_entropy(logits, target)
            else:
                loss = dynamics.update(indices, logits, target).mean_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            samples += len(indices)
    return test_accuracy(network, data), samples


def _share(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the largest."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _uniform_batches(size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from _full_batches(torch.randperm(size, generator=generator))


def _margin_batches(sampler: MarginSampler) -> Iterator[Tensor]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from _full_batches(sampler.indices())
        epoch += 1


def _full_batches(order: Tensor) -> Iterator[Tensor]:
    """Batches of an epoch. Incomplete ones are left out, unless there are no others."""
    for indices in order.split(BATCH):
        if len(indices) == BATCH or len(order) < BATCH:
            yield indices


@torch.no_grad()
def test_accuracy(network: nn.Module, data: Data) -> float:
    network.eval()
    correct = [
        (network(inputs).argmax(1) == target).sum()
        for inputs, target in zip(
            data.test_inputs.split(2000), data.test_target.split(2000), strict=True
        )
    ]
    return sum(int(count) for count in correct) / len(data.test_target)
