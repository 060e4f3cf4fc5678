"""The last-layer claim: its optima, losses and measures, and what its rows lead to."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

SMALL = {"part": "collapse", "data": "digits", "width": 16, "each": 8, "steps": 120, "seed": 3}


@pytest.fixture
def sources(claims):
    return claims("harness.data").Sources(Path("/nonexistent"))


@pytest.fixture
def claim(claims):
    return claims("last_layer").CLAIM


def flow(data, loss):
    settings = {"part": "flow", "data": data, "loss": loss, "points": 60}
    return settings | {"final_norm": 1000.0, "seed": 4}


@pytest.mark.parametrize("data", ["points in the plane", "digits"])
def test_the_solver_finds_the_largest_margin(claims, sources, data):
    product_flow = claims("trainings.product_flow")
    signed, singles = product_flow.signed_samples(flow(data, "logistic"), sources)
    best, gap = product_flow.largest_margin(signed, singles)
    assert abs(gap) < 1e-6
    assert np.linalg.norm(best[:singles]) == pytest.approx(1)
    margin = (signed @ best).min()
    if singles == 1:
        margins = [
            -minimize_scalar(
                lambda other, sign=sign: -(signed @ [sign, other]).min(),
                bounds=(-50, 50),
                method="bounded",
                options={"xatol": 1e-9},
            ).fun
            for sign in (-1, 1)
        ]
        assert margin == pytest.approx(max(margins), rel=1e-6)
    else:
        generator = np.random.default_rng(0)
        for _ in range(100):
            other = best + 0.01 * generator.normal(size=len(best))
            assert (signed @ other).min() / np.linalg.norm(other[:singles]) < margin


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_the_flow_reaches_the_optimum(claim, sources, loss):
    settings = flow("points in the plane", loss)
    result = claim.run(settings, sources)
    assert result["norm_reached"] == pytest.approx(1000)
    assert 0.99 < result["reached"] / result["optimum"] <= 1
    assert result["euclidean"] <= result["optimum"] * (1 + 1e-6)
    assert claim.run(settings, sources) == result


@pytest.mark.parametrize("loss", ["exponential", "logistic"])
def test_slopes_are_those_of_the_logarithm_of_the_loss(claims, loss):
    margins = torch.tensor([-3.0, 0.5, 20.0, 35.0], dtype=torch.float64, requires_grad=True)
    losses = (-margins).exp() if loss == "exponential" else F.softplus(-margins)
    (expected,) = torch.autograd.grad(-losses.sum().log(), margins)
    slopes = claims("trainings.product_flow").slopes
    np.testing.assert_allclose(slopes(margins.detach().numpy(), loss), expected, rtol=1e-9)
    far = slopes(np.array([5000.0, 5001.0]), loss)
    np.testing.assert_allclose(far, [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-9)


def test_the_logarithm_of_the_cross_entropy(claims):
    log_loss = claims("trainings.last_layer").log_loss
    logits = 4 * torch.randn(20, 5, dtype=torch.float64)
    target = torch.randint(5, (20,))
    expected = F.cross_entropy(logits, target).log()
    torch.testing.assert_close(log_loss(logits, target), expected)
    far = torch.tensor([[900.0, 0.0]])
    assert log_loss(far, torch.tensor([0])).item() == pytest.approx(-900)


@pytest.mark.parametrize("network", ["ResNet-18", "ReLU network with biases", "t1 x1 + t2 t3 x2"])
def test_rates_are_exact(claims, claim, sources, network):
    settings = {"part": "rates", "data": "", "network": network, "width": 2, "seed": 0}
    row = settings | claim.run(settings, sources)
    assert claims("last_layer_report").rate_error(row) == 0
    assert row["scaling_error"] < 1e-12


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_training_goes_down_and_measures_collapse(claims, claim, sources, norm):
    result = claim.run(SMALL | {"norm": norm}, sources)
    losses = [row[1] for row in result["curve"]]
    assert losses == sorted(losses, reverse=True)
    assert result["separated"]["step"] < 120
    assert result["compared"] > 0
    assert claim.run(SMALL | {"norm": norm}, sources) == result
    assert len(json.dumps(result)) < 3000


def test_neural_collapse_follows_its_definition(claims):
    last_layer = claims("trainings.last_layer")
    network = last_layer.classifier(6, 12, "layer").double()
    inputs, target = torch.randn(50, 6, dtype=torch.float64), torch.arange(50) % 10
    found = last_layer.neural_collapse(network, inputs, target)
    features = network[:-1](inputs).detach().numpy()
    means = np.stack([features[target.numpy() == label].mean(0) for label in range(10)])
    within = features - means[target.numpy()]
    means = means - means.mean(0)
    between = np.linalg.pinv(means.T @ means / 10, rcond=1e-10)
    assert found[0] == pytest.approx(np.trace(within.T @ within / 50 @ between) / 10, rel=1e-4)
    lengths = np.linalg.norm(means, axis=1)
    assert found[1] == pytest.approx(lengths.std() / lengths.mean())


def test_collapsed_features_reach_the_largest_possible_margin(claims):
    # The features of a class are all the same, and the classes are the corners of a simplex.
    corners = torch.eye(10).double() - 0.1
    corners = 10**0.5 * F.normalize(corners)
    logits = corners @ corners.T / corners.norm()
    margin = logits.diagonal() - (logits - 99 * torch.eye(10)).amax(1)
    possible = claims("last_layer_report").largest_possible({"width": 10})
    assert margin.min().item() == pytest.approx(possible)


def rows_of(claim, sources):
    """Rows as they are if the claim holds."""
    generator = np.random.default_rng(0)
    factors = {"none": 1.0, "batch": 0.2, "layer": 0.1}
    rows = []
    for settings in claim.settings(scope_of(sources)):
        row = settings | {"cpu_seconds": 1.0}
        if row["part"] == "rates":
            names = ["1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias"]
            if row["network"].startswith("residual"):
                names = ["first.weight", "last.weight", "branch.0.weight"]
            elif row["network"].startswith("t1"):
                names = ["single", "first", "second"]
            row |= {"rates": dict.fromkeys(names), "numbers": 1000, "scaling_error": 1e-16}
        elif row["part"] == "flow":
            row |= {"optimum": 1.2, "optimum_gap": 1e-9, "reached": 1.199, "euclidean": 1.1}
            row |= {"curve": [[1, 0.5], [10, 1.0], [1000, 1.199]]}
        else:
            collapse = (factors[row["norm"]] * generator.uniform(0.9, 1.1, 5)).tolist()
            steps = [10, 100, row["steps"]]
            row |= {
                "separated": {"step": 40, "margins": [0.1, 0.1, 0.1]},
                "end": {"log_loss": -30.0, "margins": [2.0, 2.0, 2.0], "collapse": collapse},
                "rising": [0.9, 0.8, 0.7],
                "compared": 100,
                "curve": [[step, -step / 9, 0.1, 0.1, 0.1, *collapse] for step in steps],
            }
        rows.append(row)
    return rows


def with_true_rates(claims, rows):
    expected_rate = claims("last_layer_report").expected_rate
    for row in rows:
        if row["part"] == "rates":
            names = list(row["rates"])
            row["rates"] = {
                name: float(expected_rate(row["network"], name, names[-2:])) for name in names
            }
    return rows


def scope_of(sources, quick=False):
    from harness.claim import Scope

    return Scope(range(4), quick, sources)


def test_report_says_what_the_rows_say(claims, claim, sources):
    rows = with_true_rates(claims, rows_of(claim, sources))
    report = claim.report(rows)
    assert report.outcome == "confirmed"
    assert "fails" not in report.verdict
    assert any("Fashion-MNIST are missing" in note for note in report.notes)

    def changed(part, change):
        others = copy.deepcopy(rows)
        change(next(row for row in others if row["part"] == part and row.get("norm") != "none"))
        return claim.report(others)

    report = changed("rates", lambda row: row["rates"].update({"1.weight": 0.25}))
    assert report.outcome == "not confirmed"
    report = changed("flow", lambda row: row.update(reached=1.1))
    assert report.outcome == "not confirmed"
    assert report.verdict.startswith("The claim fails")
    report = changed("collapse", lambda row: row["end"].update(margins=[2.0, 0.05, 2.0]))
    assert report.outcome == "partly confirmed"
    assert "in 1 of 4 runs" in report.verdict


def test_features_that_do_not_collapse_are_named(claims, claim, sources):
    rows = with_true_rates(claims, rows_of(claim, sources))
    for row in rows:
        if row["part"] == "collapse" and row["norm"] == "layer":
            row["end"]["collapse"][1] = 1.5
    report = claim.report(rows)
    assert report.outcome == "partly confirmed"
    assert "NC2, lengths" in report.verdict


def test_rows_are_drawn(claims, claim, sources):
    rows = with_true_rates(claims, rows_of(claim, sources))
    figure = claims("harness.page").figure_of(claim, rows)
    assert len(figure.axes) == 3


def test_settings(claim, sources):
    full, quick = (claim.settings(scope_of(sources, quick)) for quick in (False, True))
    keys = [json.dumps(one, sort_keys=True) for one in full]
    assert len(set(keys)) == len(keys) == 5 + 16 + 12

    def work(runs):
        return sum(one.get("steps", 0) * one.get("each", 0) for one in runs)

    assert work(quick) < work(full) / 4
