"""The claim about the inversion point: its runs against plain torch, and what its report says."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SETTINGS = {
    "data": "digits",
    "seed": 3,
    "samples": 300,
    "networks": 3,
    "optimizer": "SGD",
    "learning_rate": 0.5,
    "epochs": 60,
    "again": 2,
}


@pytest.fixture
def sources(claims):
    return claims("harness.data").Sources(Path("/nonexistent"))


@pytest.fixture
def training(claims):
    return claims("trainings.inversion")


def plain_training(training, data, left_out):
    """Network 1 of draw 3 on its own, in plain torch: radii, misclassified sets, test error."""
    network = nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 2))
    generator = torch.Generator().manual_seed(3001)
    with torch.no_grad():
        for index, inputs in ((0, 64), (2, 20)):
            bound = inputs**-0.5
            weight, bias = network[index].weight, network[index].bias
            weight = weight if index == 0 else weight.T
            drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            weight.copy_(drawn)
            bias.copy_(torch.empty(len(bias)).uniform_(-bound, bound, generator=generator))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    inputs, target = data.train_inputs[~left_out], data.train_target[~left_out]
    radii, wrong = [], []
    for _ in range(SETTINGS["epochs"]):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), target).backward()
        optimizer.step()
        with torch.no_grad():
            even = F.normalize(network[:2](inputs[target == 0]), dim=1)
            radii.append((even - even.mean(0)).square().sum(1).mean().sqrt().item())
            wrong.append(network(inputs).argmax(1) != target)
    test_wrong = network(data.test_inputs).argmax(1) != data.test_target
    return radii, wrong, test_wrong.double().mean().item()


def inversion_of(radii):
    return next((t for t in range(20, len(radii) + 1) if radii[t - 1] >= radii[t - 2]), None)


def test_networks_train_side_by_side_as_each_would_alone(training, sources):
    data = training.drawn(SETTINGS, sources)
    targets = data.train_target.expand(3, -1).clone()
    left_out = torch.zeros(300, dtype=torch.bool)
    left_out[10:40] = True
    targets[1, left_out] = training.LEFT_OUT
    trained = training.Training(SETTINGS, [3000, 3001, 3002], data, targets)

    radii, wrong, test_error = plain_training(training, data, left_out)
    expected = torch.tensor(radii, dtype=torch.float64)
    torch.testing.assert_close(trained.monitors[1].history[:, 0], expected, rtol=0, atol=1e-4)
    last = trained.misclassified[SETTINGS["epochs"]][1]
    assert last[~left_out].equal(wrong[-1]) and not last[left_out].any()
    assert trained.test_error[1].item() == pytest.approx(test_error, abs=1e-12)


def test_a_run_says_what_plain_torch_finds(training, sources):
    found = training.run(SETTINGS, sources)
    data = training.drawn(SETTINGS, sources)
    radii, wrong, test_error = plain_training(training, data, torch.zeros(300, dtype=torch.bool))
    epoch = inversion_of(radii)
    assert epoch is not None and found["inversion"][1] == epoch
    assert found["stragglers"][1] == wrong[epoch - 1].sum()
    assert found["test_error"][1] == round(test_error, 5)
    rising = [radii[t - 1] >= radii[t - 2] for t in range(20, len(radii) + 1)]
    assert found["rising"][1] == pytest.approx(sum(rising) / len(rising), abs=1e-4)

    left_out = wrong[epoch - 1]
    radii, _, test_error = plain_training(training, data, left_out)
    position = found["trained_again"].index(1)
    assert found["without_stragglers_inversion"][position] == inversion_of(radii)
    assert found["without_stragglers_test_error"][position] == round(test_error, 5)

    assert training.run(SETTINGS, sources) == found
    assert json.loads(json.dumps(found)) == found and len(json.dumps(found)) < 3000


def test_the_draw_is_standardised_and_the_target_is_the_parity(training, sources, claims):
    data = training.drawn(SETTINGS, sources)
    deviation, mean = torch.std_mean(data.train_inputs, dim=0, correction=0)
    assert mean.abs().max() < 1e-5
    assert ((deviation - 1).abs() < 1e-4).logical_or(deviation == 0).all()
    labels = claims("harness.data").load("digits", sources).test_target
    assert data.test_target.equal(labels % 2)


def test_random_sets_have_the_sizes_of_the_stragglers(training):
    sets = torch.rand(3, 50) < torch.tensor([[0.1], [0.3], [0.0]])
    drawn = training.as_many(sets, 0)
    assert drawn.sum(1).equal(sets.sum(1))
    assert not drawn.equal(sets)
    assert training.as_many(sets, 0).equal(drawn)


def test_pairs_and_their_jaccard_index(training):
    sets = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    first, second = training.pairs(sets)
    assert training.jaccard(first, second).tolist() == [pytest.approx(1 / 3), 0, 0]


def test_epochs_of_the_curves_rise_to_the_last(training):
    epochs = training.curve_epochs(400)
    assert epochs[0] == 1 and epochs[-1] == 400 and epochs == sorted(set(epochs))
    assert all(b <= 1.2 * a for a, b in pairwise(epochs) if a >= 20)
