"""The claim about fewer updates: what a run trains on, and what a report says of rows."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Claims = Callable[[str], ModuleType]
MINIMAL = {"data": "digits", "network": "perceptron", "learning_rate": 0.05, "seed": 3}


def perceptron_logits(network: Any, inputs: Tensor) -> np.ndarray:
    """The logits of a perceptron with one hidden layer, computed by NumPy."""
    flat = inputs.flatten(1).double().numpy()
    hidden, last = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (network[1], network[3])
    )
    return np.maximum(flat @ hidden[0].T + hidden[1], 0) @ last[0].T + last[1]


@pytest.mark.parametrize("sampling", [1, 2, 3])
def test_candidates_are_chosen_as_their_scheme_says(claims: Claims, sampling: int) -> None:
    training = claims("trainings.fewer_updates")
    torch.manual_seed(0)
    network = claims("trainings.networks").perceptron(64, [32], 10)
    inputs, target = torch.randn(640, 1, 8, 8), torch.arange(640) % 10
    chosen = training.choose(training.SAMPLINGS[sampling], network, inputs, target)
    logits = perceptron_logits(network, inputs)
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if sampling == 1:
        weight = network[3].weight.detach().double().numpy()
        scores = []
        for row in logits:
            second, first = np.argsort(row)[-2:]
            distance = np.linalg.norm(weight[first] - weight[second])
            scores.append((row[first] - row[second]) / distance)
        expected = np.argsort(scores)[:64]
    elif sampling == 2:
        expected = np.argsort((share * np.log(share)).sum(1))[:64]
    else:
        loss = -np.log(share[np.arange(640), target.numpy()])
        hardest = np.argsort(-loss)
        of_classes = [[i for i in hardest if target[i] == c][:6] for c in range(10)]
        expected = {int(i) for group in of_classes for i in group}
        expected |= set([int(i) for i in hardest if int(i) not in expected][:4])
    assert len(chosen) == 64
    assert set(chosen.tolist()) == {int(i) for i in expected}


def test_a_class_with_few_candidates_leaves_its_places_to_the_others(claims: Claims) -> None:
    training = claims("trainings.fewer_updates")
    loss, target = torch.arange(12.0), torch.tensor([0] + [1] * 11)
    chosen = training.hardest_of_each_class(loss, target, 6)
    assert sorted(chosen.tolist()) == [0, 7, 8, 9, 10, 11]


def test_runs_repeat_and_count_what_they_train_on(claims: Claims) -> None:
    training = claims("trainings.fewer_updates")
    sources = claims("harness.data").Sources(Path("nowhere"))
    accuracies = set()
    for sampling in training.SAMPLINGS:
        options = {"sampling": sampling, "updates": 8, "evaluate_on": "test"}
        first, second = (training.run(MINIMAL | options, sources) for _ in range(2))
        assert first["accuracy"] == second["accuracy"]
        assert first["samples"] == 8 * 64
        assert first["process_seconds"] > 0
        assert json.loads(json.dumps(first)) == first
        accuracies.add(first["accuracy"])
    assert len(accuracies) == 4
    assert max(accuracies) > 0.6


def test_the_learning_rate_drops_twice_within_the_updates(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = claims("trainings.fewer_updates")
    data = claims("harness.data").Data(
        torch.randn(640, 4), torch.arange(640) % 10, torch.randn(1, 4), torch.zeros(1).long()
    )
    rates = []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    training.train(nn.Linear(4, 10), data, "uniform", 20, 0.1, 0)
    assert rates == pytest.approx([0.1] * 10 + [0.01] * 5 + [0.001] * 5)


def rows(faster: dict[str, float], slower: float = 3.0) -> list[dict[str, Any]]:
    """Rows in which minimal margins need ``faster`` times fewer updates with each network."""
    found = []
    for network, factor in faster.items():
        for sampling, gain in [
            ("uniform", 1.0),
            ("minimal margin", factor),
            ("largest entropy", 0.9),
            ("hard negatives of each class", 0.8),
        ]:
            for seed in range(3):
                for updates in (250, 500, 1000, 2000, 4000, 8000, 16000):
                    error = 0.3 / math.log(updates * gain) + 0.0001 * seed
                    seconds = 0.001 * updates * (1 if sampling == "uniform" else slower)
                    row = {"network": network, "sampling": sampling, "updates": updates}
                    row |= {"seed": seed, "learning_rate": 0.05, "accuracy": 1 - error}
                    row |= {"samples": 64 * updates, "process_seconds": seconds}
                    found.append(row | {"wall_seconds": seconds, "cpu_seconds": seconds})
    return found


@pytest.mark.parametrize(
    ("faster", "outcome"),
    [
        ({"convolutions": 3.0, "perceptron": 2.8}, "confirmed"),
        ({"convolutions": 3.0, "perceptron": 2.0}, "partly confirmed"),
        ({"convolutions": 3.0, "perceptron": 0.8}, "partly confirmed"),
        ({"convolutions": 1.1, "perceptron": 0.8}, "not confirmed"),
    ],
)
def test_the_outcome_follows_from_the_gains(
    claims: Claims, faster: dict[str, float], outcome: str
) -> None:
    claim = claims("fewer_updates")
    report = claim.report(rows(faster))
    assert report.outcome == outcome
    # What fails is said first.
    first, second = (part.split(" for ")[0] for part in report.verdict.split("With ")[1:])
    below = ["gain in updates is below 2.5" in part for part in (first, second)]
    assert below == sorted((factor < 2.5 for factor in faster.values()), reverse=True)
    gains = {(row[0], row[1]): row[2:4] for row in report.tables[0].rows}
    for network, factor in faster.items():
        updates, seconds = (float(cell.split()[0]) for cell in gains[network, "minimal margin"])
        assert updates == pytest.approx(factor, rel=0.02)
        assert seconds == pytest.approx(factor / 3, rel=0.03)


def test_the_verdict_says_what_the_selection_costs(claims: Claims) -> None:
    claim = claims("fewer_updates")
    slow = claim.report(rows({"convolutions": 2.0}, slower=4)).verdict
    pattern = r"need ([\d.]+) .*times as many updates .* and ([\d.]+) .*times the CPU time"
    updates, seconds = map(float, re.search(pattern, slow).groups())
    assert updates == pytest.approx(2, abs=0.05) and seconds == pytest.approx(0.5, abs=0.05)
    assert "the gain in updates is below 2.5" in slow


def test_uniform_updates_are_those_of_the_same_accuracy(claims: Claims) -> None:
    report = claims("fewer_updates").report(rows({"convolutions": 2.0}))
    cells = {tuple(row[1:3]): row[-1] for row in report.tables[1].rows}
    assert cells["minimal margin", "1,000"] == "2,000"
    assert cells["minimal margin", "16,000"] == "-"
    assert cells["uniform", "1,000"] == ""


def test_without_a_common_accuracy_nothing_is_confirmed(claims: Claims) -> None:
    claim = claims("fewer_updates")
    few = [
        row
        for row in rows({"convolutions": 1000.0})
        if (row["updates"] > 8000) == (row["sampling"] != "uniform")
    ]
    report = claim.report(few)
    assert report.outcome == "not confirmed"
    assert "no common accuracy" in report.verdict


def test_settings_are_complete_distinct_and_fewer_when_quick(claims: Claims) -> None:
    claim, harness = claims("fewer_updates").CLAIM, claims("harness.claim")
    here = claims("harness.data").Sources(Path(__file__).parent)
    full = claim.settings(harness.Scope(range(5), False, here))
    quick = claim.settings(harness.Scope(range(2), True, here))
    keys = {json.dumps(one, sort_keys=True) for one in full}
    assert len(keys) == len(full)
    assert all(json.loads(json.dumps(one)) == one for one in full)
    assert sum(one["updates"] for one in quick) < sum(one["updates"] for one in full) / 10
    pairs = {(one["network"], one["sampling"]) for one in full}
    assert len(pairs) == 8
    nowhere = claims("harness.data").Sources(Path("nowhere"))
    assert claim.settings(harness.Scope(range(5), False, nowhere)) == []


def test_the_figure_has_two_panels_for_each_network(claims: Claims) -> None:
    page = claims("harness.page")
    figure = page.figure_of(
        claims("fewer_updates").CLAIM, rows({"convolutions": 3.0, "perceptron": 2.0})
    )
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "updates",
        "CPU seconds of training",
    ] * 2
