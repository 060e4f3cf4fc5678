"""Finds training samples with wrong labels: they are the hardest for a trained network.

Forty labels of scikit-learn's digits are changed on purpose. After training, one call of
``sample_statistics`` tells the margin, the loss and the EL2N score of every sample.

    python examples/find_hard_samples.py

takes a few seconds on one CPU and needs the ``metrics`` extra for the margins' distribution.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from marginops import sample_statistics, select_smallest
from marginops.metrics import MarginDistribution

WRONG, EPOCHS = 40, 60


def main() -> None:
    torch.manual_seed(0)
    images, classes = load_digits(return_X_y=True)
    inputs, target = torch.tensor(images / 16).float(), torch.tensor(classes)
    wrong = torch.randperm(len(target))[:WRONG]
    target[wrong] = (target[wrong] + torch.randint(1, 10, (WRONG,))) % 10

    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        cross_entropy(network(inputs), target).backward()
        optimizer.step()

    with torch.no_grad():
        statistics = sample_statistics(network(inputs), target)
    rankings = {
        "smallest margins": select_smallest(statistics.margin, WRONG).indices,
        "largest losses": statistics.loss.topk(WRONG).indices,
        "largest EL2N scores": statistics.el2n.topk(WRONG).indices,
    }
    print(f"{WRONG} of the {len(target)} labels are wrong.")
    for name, hardest in rankings.items():
        found = int(torch.isin(hardest, wrong).sum())
        print(f"Of the {WRONG} samples with the {name}, {found} have a wrong label.")

    margins = MarginDistribution(quantiles=[0.05, 0.5, 0.95])
    margins.update(statistics.margin)
    summary = margins.compute()
    low, median, high = summary.quantiles.tolist()
    print(f"{100 * summary.separation.item():.1f} % of all margins are positive.")
    print(f"Half of them exceed {median:.2f}; 90 % lie between {low:.2f} and {high:.2f}.")


if __name__ == "__main__":
    main()
