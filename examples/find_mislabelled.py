"""Finds wrong labels by what an ordinary training run sees of every sample.

    python examples/find_mislabelled.py

takes a few seconds on one CPU. Of the labels of scikit-learn's digits, 180 are changed on purpose.
"""

import torch
from sklearn.datasets import load_digits

from marginops.training import TrainingDynamics

torch.manual_seed(0)
images, classes = load_digits(return_X_y=True)
inputs, target = torch.tensor(images / 16).float(), torch.tensor(classes)
wrong = torch.randperm(len(target))[:180]
target[wrong] = (target[wrong] + torch.randint(1, 10, (180,))) % 10

network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
dynamics = TrainingDynamics(num_samples=len(target))
for _ in range(20):
    for indices in torch.randperm(len(target)).split(32):
        logits = network(inputs[indices])
        loss = dynamics.update(indices, logits, target[indices]).mean_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

suspicious = dynamics.label_issues().indices[:180]
found = torch.isin(suspicious, wrong).sum()
print(f"180 of the {len(target)} labels are wrong.")
print(f"Of the 180 most suspicious samples, {found} have a wrong label.")
points = dynamics.data_map()
is_wrong = torch.isin(points.indices, wrong)
print(f"The mean confidence of wrong labels is {points.confidence[is_wrong].mean():.2f}.")
print(f"The mean confidence of the others is {points.confidence[~is_wrong].mean():.2f}.")
