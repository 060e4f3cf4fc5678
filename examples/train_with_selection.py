"""Compares batches chosen by their margins with uniform batches, in a plain training loop.

Every step draws 160 candidates. ``select_batch`` keeps the 16 that are closest to a decision
boundary of the network; a uniform batch keeps the first 16. Both make the same number of updates,
but selection also runs the network on all candidates, which takes time.

    python examples/train_with_selection.py

takes a few seconds on one CPU. The data are scikit-learn's digits: nothing is downloaded.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from marginops.training import select_batch

CANDIDATES, BATCH, STEPS, SEEDS = 160, 16, 500, 5


def train(inputs: torch.Tensor, target: torch.Tensor, seed: int, *, by_margin: bool) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (CANDIDATES,))
        kept = select_batch(network, inputs[batch], k=BATCH) if by_margin else torch.arange(BATCH)
        batch = batch[kept]
        optimizer.zero_grad()
        cross_entropy(network(inputs[batch]), target[batch]).backward()
        optimizer.step()
    return network


def main() -> None:
    images, classes = load_digits(return_X_y=True)
    inputs, target = torch.tensor(images / 16).float(), torch.tensor(classes)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    training, test = order[:1347], order[1347:]

    accuracies = {}
    for name, by_margin in [("uniform", False), ("minimal-margin", True)]:
        accuracy = torch.zeros(SEEDS)
        for seed in range(SEEDS):
            network = train(inputs[training], target[training], seed, by_margin=by_margin)
            predicted = network(inputs[test]).argmax(1)
            accuracy[seed] = 100 * (predicted == target[test]).float().mean()
        print(f"Mean test accuracy with {name} batches: {accuracy.mean():.2f} %.")
        accuracies[name] = accuracy

    better = int((accuracies["minimal-margin"] > accuracies["uniform"]).sum())
    print(f"Minimal-margin batches are better for {better} of {SEEDS} seeds.")


if __name__ == "__main__":
    main()
