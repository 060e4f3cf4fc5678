"""The claim about the multi-margin regularization: the loss, the runs, and what a report says."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Claims = Callable[[str], ModuleType]
MINIMAL = {"data": "digits", "network": "perceptron", "samples": None, "epochs": 4}
MINIMAL |= {"learning_rate": 0.05, "weight_decay": 5e-4, "evaluate_on": "test", "seed": 3}
IMAGES, TEXTS = "Fashion-MNIST", "20 Newsgroups"


def small_network(claims: Claims) -> Any:
    """A perceptron for 12 inputs and 5 classes, in float64."""
    torch.manual_seed(0)
    return claims("trainings.networks").perceptron(12, [8], 5).double()


def parts(network: Any, inputs: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, logits and the last weight of a perceptron, computed by NumPy."""
    first, last = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in (network[1], network[3])
    )
    features = np.maximum(inputs.numpy() @ first[0].T + first[1], 0)
    return features, features @ last[0].T + last[1], last[0]


def rivals(logits: np.ndarray, target: Tensor) -> np.ndarray:
    """The strongest wrong class of every sample."""
    wrong = logits.copy()
    wrong[np.arange(len(wrong)), target.numpy()] = -np.inf
    return wrong.argmax(1)


def expected_loss(network: Any, inputs: Tensor, target: Tensor, alpha: float) -> float:
    """Cross-entropy plus alpha times the squared product of largest norm and mean distance."""
    features, logits, weight = parts(network, inputs)
    right = logits[np.arange(len(logits)), target.numpy()]
    entropy = (np.log(np.exp(logits).sum(1)) - right).mean()
    pairs = weight[target.numpy()] - weight[rivals(logits, target)]
    radius = np.linalg.norm(features, axis=1).max()
    return float(entropy + alpha * (radius * np.linalg.norm(pairs, axis=1).mean()) ** 2)


def test_the_loss_and_its_gradient_are_those_of_the_formula(claims: Claims) -> None:
    training = claims("trainings.regularization")
    network = small_network(claims)
    inputs = torch.randn(16, 12, dtype=torch.float64)
    target = torch.arange(16) % 5
    term = claims("marginops").nn.MultiMarginRegularization(3, 0.01, 1)
    term.set_epoch(2)
    plain, regularized = (training.loss_of(network, inputs, target, one) for one in (None, term))
    assert plain.item() == pytest.approx(expected_loss(network, inputs, target, 0), rel=1e-12)
    assert regularized.item() == pytest.approx(expected_loss(network, inputs, target, 1), rel=1e-12)
    regularized.backward()
    for layer in (network[1], network[3]):
        weight = layer.weight
        direction = torch.randn_like(weight)
        slopes = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight += step * direction
                slopes.append(expected_loss(network, inputs, target, 1))
                weight -= step * direction
        slope = (slopes[0] - slopes[1]) / 2e-6
        assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5)


def test_the_margin_is_a_share_of_the_largest_norm(claims: Claims) -> None:
    training = claims("trainings.regularization")
    network = small_network(claims)
    inputs = torch.randn(15, 12, dtype=torch.float64)
    target = torch.arange(15) % 5
    found = training.median_margin(network, inputs, target)
    features, logits, weight = parts(network, inputs)
    rows, rival = np.arange(15), rivals(logits, target)
    distance = np.linalg.norm(weight[target.numpy()] - weight[rival], axis=1)
    margins = (logits[rows, target.numpy()] - logits[rows, rival]) / distance
    expected = np.median(margins) / np.linalg.norm(features, axis=1).max()
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_schedules_are_those_of_steps_and_epochs(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = claims("trainings.regularization")
    samples = torch.randn(3 * training.BATCH + 5, 12), torch.arange(3 * training.BATCH + 5) % 5
    data = claims("harness.data").Data(*samples, *samples)
    loss_of, alphas, rates = training.loss_of, [], []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            assert self.param_groups[0]["weight_decay"] == 5e-4
            super().step(closure)

    def recorded(*arguments: Any) -> Tensor:
        alphas.append(arguments[-1] and arguments[-1].alpha.item())
        return loss_of(*arguments)

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    monkeypatch.setattr(training, "loss_of", recorded)
    for coefficient in (0.0, 0.2):
        network = training.new_network("perceptron", data)
        training.train(network, data, MINIMAL | {"coefficient": coefficient}, steps=12)
    line = [0.002 + 0.198 * epoch / 3 for epoch in range(4)]
    expected = [0.0] * 3 + [line[1]] * 3 + [line[2]] * 3 + [0.2] * 3
    assert alphas[:12] == [None] * 12
    assert alphas[12:] == pytest.approx(expected)
    shares = [0.5 * (1 + np.cos(np.pi * (step - 1) / 11)) for step in range(1, 12)]
    assert rates == pytest.approx([0.05 * share for share in (1, *shares)] * 2)


def test_a_seed_chooses_the_training_samples(claims: Claims) -> None:
    training = claims("trainings.regularization")
    inputs, target = torch.arange(60.0).reshape(60, 1), torch.arange(60) % 10
    data = claims("harness.data").Data(inputs, target, inputs - 1000, target)
    first, again, other = (training.drawn(data, 20, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train_inputs, again.train_inputs)
    assert not torch.equal(first.train_inputs, other.train_inputs)
    assert len(set(first.train_inputs.flatten().tolist())) == 20
    assert torch.equal(first.train_inputs.flatten().long() % 10, first.train_target)
    assert torch.equal(first.test_inputs, data.test_inputs)
    assert training.drawn(data, None, 0) is data


def test_runs_repeat_and_the_regularization_makes_margins_larger(claims: Claims) -> None:
    training = claims("trainings.regularization")
    sources = claims("harness.data").Sources(Path("nowhere"))
    found = {}
    for coefficient in (0.0, 1e-9, 1e-3):
        options = MINIMAL | {"coefficient": coefficient}
        first, second = (training.run(options, sources) for _ in range(2))
        assert first.pop("step_seconds") > 0 and second.pop("step_seconds") > 0
        assert first == second
        assert json.loads(json.dumps(first)) == first
        found[coefficient] = first
    # Pairs have the same samples, weights and batches: a coefficient of almost 0 changes nothing.
    assert found[1e-9]["train_loss"] == pytest.approx(found[0.0]["train_loss"], rel=1e-3)
    assert found[1e-3]["margin"] > 1.02 * found[0.0]["margin"]
    assert found[1e-3]["train_loss"] > found[0.0]["train_loss"]
    assert all(0 < one["test_error"] < 0.2 for one in found.values())
    held_out = training.run(MINIMAL | {"coefficient": 0.0, "evaluate_on": "held-out"}, sources)
    assert held_out["test_error"] != found[0.0]["test_error"]


def rows(gains: dict[tuple[str, str], float], seeds: int = 6) -> list[dict[str, Any]]:
    """Rows in which the regularization lowers the error by these points, and costs half a step."""
    found = []
    for (data, network), gain in gains.items():
        for loss in ("cross-entropy", "with regularization"):
            is_plain = loss == "cross-entropy"
            for seed in range(seeds):
                # Seeds differ more than losses do, so only pairs show the difference.
                error = 0.1 + 0.01 * seed - (0 if is_plain else gain / 100 + 0.0001 * (seed % 2))
                row = {"data": data, "network": network, "samples": None, "epochs": 2, "loss": loss}
                row |= {"learning_rate": 0.1, "weight_decay": 5e-4, "evaluate_on": "test"}
                row |= {"coefficient": 0.0 if is_plain else 1e-4, "seed": seed}
                row |= {"test_error": error, "train_error": 0.05, "train_loss": 0.2}
                row |= {"margin": 0.1 if is_plain else 0.2}
                step = 0.002 if is_plain else 0.003
                found.append(row | {"step_seconds": step, "cpu_seconds": 1.0})
    return found


@pytest.mark.parametrize(
    ("convolutions", "perceptron", "texts", "outcome"),
    [
        (0.5, 0.5, 0.5, "confirmed"),
        (0.5, -0.005, 0.5, "confirmed"),
        (0.5, -0.5, 0.5, "partly confirmed"),
        (0.5, 0.5, -0.005, "partly confirmed"),
        (-0.005, -0.005, 0.5, "partly confirmed"),
        (-0.005, -0.5, -0.005, "not confirmed"),
    ],
)
def test_the_outcome_follows_from_the_intervals(
    claims: Claims, convolutions: float, perceptron: float, texts: float, outcome: str
) -> None:
    tasks = {
        (IMAGES, "convolutions"): convolutions,
        (IMAGES, "perceptron"): perceptron,
        (TEXTS, "perceptron"): texts,
    }
    report = claims("regularization").report(rows(tasks))
    assert report.outcome == outcome
    # What fails is said first.
    places = [report.verdict.find(what) for what in ("raises", "no difference", "lowers")]
    assert [place for place in places if place >= 0] == sorted(p for p in places if p >= 0)
    for gain, part in ((-0.5, "raises"), (0.5, "lowers"), (-0.005, "no difference")):
        assert (part in report.verdict) == (gain in tasks.values())


def test_the_tables_have_the_differences_and_the_costs(claims: Claims) -> None:
    report = claims("regularization").report(rows({(IMAGES, "convolutions"): 0.518}))
    errors, effects = (table.rows for table in report.tables)
    assert errors[0][2:6] == ("cross-entropy", "0.1", "0.0005", "0")
    assert errors[1][2:6] == ("with regularization", "0.1", "0.0005", "0.0001")
    assert errors[0][6].startswith("12.50 ± 1.87")
    assert errors[0][7] == ""
    assert errors[1][7] == "0.523 (0.518 to 0.528)"
    assert effects[1][5:7] == ("0.200 ± 0.000", "2.00 (2.00 to 2.00)")
    assert effects[1][7:] == ("3.00 ± 0.00", "1.50 (1.50 to 1.50)")
    assert "by 0.523 (0.518 to 0.528) percentage points, from 12.50 to 11.98 %" in report.verdict
    assert any("Reuters R8" in note for note in report.notes)


def test_with_one_seed_nothing_is_confirmed(claims: Claims) -> None:
    claim = claims("regularization")
    single = claim.report(rows({(IMAGES, "convolutions"): 0.5}, seeds=1))
    assert single.outcome == "not confirmed"


def test_settings_are_complete_distinct_and_fewer_when_quick(claims: Claims) -> None:
    claim, harness = claims("regularization").CLAIM, claims("harness.claim")
    here = claims("harness.data").Sources(Path(__file__).parent, None, Path(__file__))
    full = claim.settings(harness.Scope(range(10), False, here))
    quick = claim.settings(harness.Scope(range(2), True, here))
    assert len({json.dumps(one, sort_keys=True) for one in full}) == len(full) == 10 * 4 * 2
    assert all(json.loads(json.dumps(one)) == one for one in full)
    assert sum(one["epochs"] for one in quick) < sum(one["epochs"] for one in full) / 10
    # A pair differs in its loss and in what is tuned for it, in nothing else.
    tuned = "loss", "learning_rate", "weight_decay", "coefficient"
    common = [{key: one[key] for key in one if key not in tuned} for one in full]
    assert common[::2] == common[1::2]
    assert {one["coefficient"] == 0 for one in full[::2]} == {True}
    assert {one["coefficient"] > 0 for one in full[1::2]} == {True}
    nowhere = claims("harness.data").Sources(Path("nowhere"))
    assert claim.settings(harness.Scope(range(5), False, nowhere)) == []


def test_the_figure_has_a_line_for_each_network(claims: Claims) -> None:
    page = claims("harness.page")
    gains = {(IMAGES, "convolutions"): 0.5, (TEXTS, "perceptron"): -0.5}
    figure = page.figure_of(claims("regularization").CLAIM, rows(gains))
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["Fashion-MNIST\nwith the convolutional network", "20 Newsgroups"]
    dots = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 6]
    assert [np.sign(one[0]) for one in dots] == [1, -1]
