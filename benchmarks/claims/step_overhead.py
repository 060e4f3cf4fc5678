"""Measure what dynamics and sampler add to a training step: MLP 784-256-10, batches of 128.

python benchmarks/claims/step_overhead.py           # about a minute
python benchmarks/claims/step_overhead.py --rounds 5

Both loops draw indices, take rows, compute the loss, and step. One uses F.cross_entropy and a
random permutation, the other TrainingDynamics and MarginSampler, whose epochs are part of the time.
The loops take turns, a round each. The result is the median ratio of CPU times on one thread.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginops.training import MarginSampler, TrainingDynamics

SAMPLES, BATCH, STEPS = 60_000, 128, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds of 400 steps (default: 30)")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 784, generator=generator)
    target = torch.randint(10, (SAMPLES,), generator=generator)

    dynamics = TrainingDynamics(SAMPLES)
    sampler = MarginSampler(dynamics)
    uniform = loop(inputs, target, permutations(), lambda _, *pair: F.cross_entropy(*pair))
    margins = loop(
        inputs, target, epochs(sampler), lambda *batch: dynamics.update(*batch).mean_loss()
    )
    seconds = [(process_time(uniform), process_time(margins)) for _ in range(rounds + 1)][1:]
    ratios = [with_margins / plain for plain, with_margins in seconds]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    plain = statistics.median(plain for plain, _ in seconds)
    print(f"uniform step: {1e6 * plain / STEPS:.0f} us")
    print(f"step with dynamics and sampler: {middle:.3f} times (quartiles {low:.3f}, {high:.3f})")


def loop(
    inputs: Tensor,
    target: Tensor,
    orders: Iterator[Tensor],
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Train for ever; each turn is a step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True
    )
    for order in orders:
        for indices in order.split(BATCH):
            loss = loss_of(indices, network(inputs[indices]), target[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def permutations() -> Iterator[Tensor]:
    while True:
        yield torch.randperm(SAMPLES)[: SAMPLES // BATCH * BATCH]


def epochs(sampler: MarginSampler) -> Iterator[Tensor]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield sampler.indices()[: len(sampler) // BATCH * BATCH]
        epoch += 1


def process_time(loop: Iterator[None]) -> float:
    start = time.process_time()
    for _ in range(STEPS):
        next(loop)
    return time.process_time() - start


if __name__ == "__main__":
    main()
