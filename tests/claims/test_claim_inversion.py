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


AT = [50, 100, 150, 200]


def row(seed, *, peak=100, errors=0.03, inversion_without=None, test_error_without=0.05, **other):
    """A row of four networks that invert near epoch 100; two of them are trained again."""
    stragglers = [round(8192 * (errors + 0.001 * shift)) for shift in (-1, 0, 0, 1)]
    return {
        "data": "Fashion-MNIST",
        "seed": seed,
        "samples": 8192,
        "networks": 4,
        "optimizer": "SGD",
        "learning_rate": 0.1,
        "epochs": 200,
        "again": 2,
        "at": AT,
        "inversion": [95, 100, 100, 105],
        "stragglers": stragglers,
        "jaccard": 0.8,
        "rising": [0.5] * 4,
        "test_error": [0.04 + 0.0001 * seed] * 4,
        "radius": [0.8, 0.5, 0.6, 0.7],
        "error_sd": [0.001] * 4,
        "stability": [60.0 if epoch == peak else 40.0 for epoch in AT],
        "overlap": [0.7, 0.8, 0.9, 0.8],
        "trained_again": [0, 2],
        "without_stragglers_inversion": [inversion_without] * 2,
        "without_stragglers_rising": [0.0] * 2,
        "without_stragglers_test_error": [test_error_without] * 2,
        "without_stragglers_radius": [0.8, 0.5, 0.4, 0.3],
        "without_random_inversion": [101, 102],
        "without_random_rising": [0.5] * 2,
        "without_random_test_error": [0.041 + 0.0001 * seed] * 2,
        "without_random_radius": [0.8, 0.5, 0.6, 0.7],
    } | other


def without_inversion(seed):
    nothing = {
        key: value
        for key, value in row(seed).items()
        if not key.startswith("without_") and key not in ("trained_again", "jaccard")
    }
    return nothing | {"inversion": [None] * 4, "stragglers": [None] * 4}


@pytest.fixture
def claim(claims):
    return claims("inversion")


def test_a_claim_that_holds_everywhere_is_confirmed(claim):
    report = claim.report([row(seed) for seed in range(5)])
    assert report.outcome == "confirmed"
    assert "Against" not in report.verdict
    assert "3.00 % with a standard deviation of 0.08 points" in report.verdict
    assert "4 of" not in report.verdict and "10 of 10 networks have no inversion" in report.verdict
    first, second = report.tables
    assert first.rows == [
        ["SGD, 0.1", "20 of 20", "100 ± 4", "3.00 ± 0.00", "0.08", "246 ± 6", "0.80 (0.015)"]
    ]
    assert [line[:3] for line in second.rows] == [
        ["all images", "10 of 10", "50"],
        ["no stragglers", "0 of 10", "0"],
        ["as many random ones left out", "10 of 10", "50"],
    ]
    assert any("MNIST was not run" in note for note in report.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stragglers": [100, 200, 300, 400]}, "the training error at the inversion is 3.05 %"),
        ({"jaccard": 0.6}, "mean Jaccard index of 0.60"),
        (
            {"peak": 150},
            "at epoch 150, where z is largest, and the mean inversion is at epoch 100 (",
        ),
        ({"inversion_without": 150}, "without their stragglers 0 of 10 networks"),
        ({"test_error_without": 0.0405}, "leaving out the stragglers adds 0.03"),
    ],
)
def test_a_part_that_fails_is_named_first(claim, change, said):
    report = claim.report([row(seed, **change) for seed in range(5)])
    assert report.outcome == "partly confirmed"
    against, agreeing = report.verdict.split(" As claimed, ")
    assert against.startswith("Against the claim, ") and said in against
    assert said not in agreeing and agreeing.count(";") == 3


def test_a_claim_that_fails_is_not_confirmed(claim):
    change = {"peak": 150, "jaccard": 0.6, "inversion_without": 150, "test_error_without": 0.04}
    report = claim.report([row(seed, **change) for seed in range(5)])
    assert report.outcome == "not confirmed"


def test_runs_without_inversion_are_reported(claim):
    rows = [without_inversion(seed) for seed in range(3)]
    report = claim.report(rows)
    assert report.outcome == "not confirmed"
    assert report.verdict == "Against the claim, 0 of 12 networks have an inversion."
    assert report.tables[0].rows == [["SGD, 0.1", "0 of 12", *["-"] * 5]]
    some = claim.report([row(0), row(1), *rows])
    assert some.tables[0].rows[0][1] == "8 of 20"
    one = without_inversion(0) | {"trained_again": [0], "inversion": [100, None, None, None]}
    one |= {key: value[:1] for key, value in row(0).items() if key.startswith("without_")}
    one |= {"stragglers": [200, None, None, None]}
    assert claim.report([one, *rows[1:]]).outcome == "not confirmed"
    draw(claim, rows)


def test_every_data_set_has_to_agree(claim):
    rows = [row(seed) for seed in range(5)]
    rows += [row(seed, data="MNIST", peak=200) for seed in range(5)]
    report = claim.report(rows)
    assert report.outcome == "partly confirmed"
    assert report.verdict.startswith("Against the claim, runs agree most at epoch 200")
    assert len(report.tables) == 4 and not any("not run" in note for note in report.notes)


def draw(claim, rows):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    claim.draw(rows, figure)
    return figure


def test_the_figure_has_the_curves_and_the_optimizers(claim):
    rows = [row(seed) for seed in range(2)]
    rows += [row(0, optimizer="Adam", learning_rate=0.001, again=0)]
    radius, stability, errors = draw(claim, rows).axes
    assert len(radius.lines) == 4 and len(stability.lines) == 2
    assert [label.get_text() for label in errors.get_yticklabels()] == ["SGD, 0.1", "Adam, 0.001"]


def test_settings_are_complete_unique_and_fewer_if_quick(claim, claims, tmp_path):
    scope, sources = claims("harness.claim").Scope, claims("harness.data").Sources
    only_fashion, both = sources(tmp_path), sources(tmp_path, tmp_path)
    full = claim.settings(scope(range(10), False, only_fashion))
    quick = claim.settings(scope(range(2), True, only_fashion))
    texts = {json.dumps(one, sort_keys=True) for one in full + quick}
    assert len(texts) == len(full) + len(quick)
    assert all(one.keys() == SETTINGS.keys() for one in full + quick)

    def cost(settings):
        return sum(one["epochs"] * (one["networks"] + 2 * one["again"]) for one in settings)

    assert cost(quick) < cost(full) / 10
    assert len(claim.settings(scope(range(10), False, both))) == len(full) + 10
    assert claim.settings(scope(range(10), False, sources(tmp_path / "none"))) == []
