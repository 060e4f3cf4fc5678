"""The claim about changed labels: what a run changes and measures, and what a report says."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

Claims = Callable[[str], ModuleType]
MINIMAL = {"data": "digits", "samples": 1000, "rate": 0.2, "learning_rate": 0.05}
MINIMAL |= {"noise": "symmetric noise", "epochs": 6, "folds": 3, "seed": 3}


def pairs_in_order(scores: np.ndarray, is_changed: np.ndarray) -> float:
    """The AUROC by all pairs; equal scores count half."""
    changed, others = scores[is_changed][:, None], scores[~is_changed]
    return float(((changed < others) + 0.5 * (changed == others)).mean())


@pytest.mark.parametrize("rate", [0.05, 0.4])
def test_symmetric_noise_takes_all_other_classes_alike(claims: Claims, rate: float) -> None:
    training = claims("trainings.label_issues")
    clean = torch.arange(200_000) % 10
    settings = {"noise": training.SYMMETRIC, "rate": rate, "seed": 0}
    labels, is_changed = training.changed_labels(clean, settings)
    assert torch.equal(is_changed, labels != clean)
    assert is_changed.float().mean().item() == pytest.approx(rate, abs=0.005)
    counts = torch.zeros(10, 10).index_put((clean, labels), torch.tensor(1.0), accumulate=True)
    others = counts[~torch.eye(10, dtype=torch.bool)]
    expected = 20_000 * rate / 9
    assert (others - expected).abs().max() < 5 * expected**0.5
    again = training.changed_labels(clean, settings | {"seed": 1})[0]
    assert not torch.equal(again, labels)


def test_noise_among_similar_classes_stays_there(claims: Claims) -> None:
    training = claims("trainings.label_issues")
    clean = torch.arange(100_000) % 10
    settings = {"noise": training.SIMILAR, "rate": 0.2, "seed": 0}
    labels, is_changed = training.changed_labels(clean, settings)
    assert torch.equal(is_changed, labels != clean)
    moves = {tuple(pair) for pair in torch.stack([clean, labels], 1)[is_changed].tolist()}
    assert moves == {(0, 6), (6, 0), (2, 4), (4, 2), (7, 9), (9, 7)}
    shares = [is_changed[clean == i].float().mean().item() for i in range(10)]
    for i, share in enumerate(shares):
        assert share == pytest.approx(0.2 if i in (0, 2, 4, 6, 7, 9) else 0, abs=0.02)


@pytest.mark.parametrize("method", [0, 1, 2, 3])
def test_runs_repeat_and_find_changed_labels(claims: Claims, method: int) -> None:
    training = claims("trainings.label_issues")
    name = list(training.METHODS)[method]
    if name == training.CLEANLAB:
        pytest.importorskip("cleanlab", reason="cleanlab is compared where it is installed")
    sources = claims("harness.data").Sources(Path("nowhere"))
    first, second = (training.run(MINIMAL | {"method": name}, sources) for _ in range(2))
    assert first.pop("process_seconds") > 0
    second.pop("process_seconds")
    assert first == second
    assert json.loads(json.dumps(first)) == first
    assert first["auroc"] > 0.9
    assert first["average_precision"] > 0.5
    has_rule = name in (training.CLEANLAB, training.THRESHOLD)
    assert ("precision" in first) == ("recall" in first) == has_rule
    if name == training.LABEL_ISSUES:
        assert first["auroc_by"]["aum"] == first["auroc"]
        assert len(set(first["auroc_by"].values())) == 4


def test_the_loss_is_that_of_the_trained_network(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, stopwatch = claims("trainings.label_issues"), claims("marginops.training").Stopwatch
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3))
    monkeypatch.setattr(training, "train", lambda *arguments: network)
    inputs, labels = torch.randn(50, 1, 3, 3), torch.arange(50) % 3
    found = training.loss_of_trained(inputs, labels, {}, stopwatch())
    weight, bias = (one.detach().double().numpy() for one in network[1].parameters())
    logits = inputs.flatten(1).double().numpy() @ weight.T + bias
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(50), labels.numpy()]
    np.testing.assert_allclose(found.scores.numpy(), -loss, rtol=1e-5)
    is_changed = torch.arange(50) % 7 == 0
    expected = pairs_in_order(-loss, is_changed.numpy())
    assert training.figures(found, is_changed)["auroc"] == pytest.approx(expected)


def test_precision_and_recall_are_those_of_the_flagged_samples(claims: Claims) -> None:
    training = claims("trainings.label_issues")
    is_changed = torch.tensor([True, True, True, False, False, False])
    # Sample 2 is not judged, so that its changed label is not missed.
    judged, flagged = torch.tensor([0, 1, 3, 4, 5]), torch.tensor([0, 3, 4])
    found = training.Found(judged, torch.tensor([0.0, 2.0, 1.0, 3.0, 4.0]), flagged)
    row = training.figures(found, is_changed)
    assert row["precision"] == pytest.approx(1 / 3)
    assert row["recall"] == pytest.approx(1 / 2)
    assert row["auroc"] == pytest.approx(5 / 6)
    assert row["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    nothing = found._replace(flagged=torch.tensor([], dtype=torch.long))
    assert training.figures(nothing, is_changed)["recall"] == 0


def test_cleanlab_gets_probabilities_of_networks_that_did_not_see_the_sample(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cleanlab", reason="cleanlab is compared where it is installed")
    training, stopwatch = claims("trainings.label_issues"), claims("marginops.training").Stopwatch
    inputs, labels = torch.arange(300.0)[:, None], torch.arange(300) % 3

    def train(inputs: Any, labels: Any, *more: Any) -> Any:
        seen = set(inputs.flatten().tolist())
        assert len(seen) == 240

        def network(batch: Any) -> Any:
            assert not seen & set(batch.flatten().tolist())
            # A logit of 1 for one class, so two of three labels get a small probability.
            return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(batch), 3)

        return network

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "logits_of", lambda network, inputs: network(inputs))
    settings = {"folds": 5, "seed": 0}
    found = training.out_of_sample(inputs, labels, settings, stopwatch())
    share = np.exp([1.0, 0.0, 0.0]) / (np.e + 2)
    np.testing.assert_allclose(found.scores.numpy(), share[labels.numpy()], rtol=1e-5)


def test_without_changed_labels_a_run_keeps_the_first_samples(claims: Claims) -> None:
    training = claims("trainings.label_issues")
    sources = claims("harness.data").Sources(Path("nowhere"))
    settings = MINIMAL | {"method": training.LABEL_ISSUES, "rate": 0.0}
    row = training.run(settings, sources)
    assert set(row) == {"sheet", "process_seconds"}
    target = claims("harness.data").load("digits", sources).train_target
    sheet = row["sheet"]
    assert [target[i].item() for i in sheet["indices"]] == sheet["labels"]
    assert len(set(sheet["indices"])) == len(sheet["predictions"]) == 40
    assert sheet["predictions"] != sheet["labels"]


NOISES = ("symmetric noise (5 %)", "symmetric noise (20 %)", "symmetric noise (40 %)")
NOISES += ("noise among similar classes (20 %)",)


def rows(
    gains: tuple[float, ...] = (0.01,) * 4,
    times: float = 12.0,
    left_out: tuple[str, ...] = (),
    seeds: int = 5,
) -> list[dict[str, Any]]:
    """Rows in which ``label_issues`` gains some AUROC over cleanlab at each of four noises."""
    found = []
    for noise, gain in zip(NOISES, gains, strict=True):
        kind, percent = noise.removesuffix(" %)").split(" (")
        for seed in range(seeds):
            for name, auroc, seconds in [
                ("label_issues", 0.97 + gain, 5.0),
                ("loss of the trained network", 0.96, 5.5),
                ("cleanlab, 5 folds", 0.97, 5.0 * times),
            ]:
                row = {"name": name, "noise": kind, "rate": int(percent) / 100, "seed": seed}
                row |= {
                    "samples": 60_000,
                    "epochs": 4,
                    "learning_rate": 0.05,
                    "average_precision": 0.9,
                }
                row |= {"auroc": auroc + 0.001 * (seed % 3), "process_seconds": seconds + seed}
                if name == "label_issues":
                    # So that the interval of a gain of 0 contains 0.
                    row["auroc"] += 0.0001 * (seed - 2)
                    values = row["auroc"], 0.9, row["auroc"] - 0.003, row["auroc"] + 0.002
                    keys = "aum", "margin_average", "margin", "margin of the trained network"
                    row["auroc_by"] = dict(zip(keys, values, strict=True))
                if name.startswith("cleanlab"):
                    row |= {"precision": 0.5, "recall": 0.25, "cleanlab": "2.9.0"}
                    row["process_seconds"] = times * (5.0 + seed)
                found.append(row | {"cpu_seconds": seconds})
    return [row for row in found if row["name"] not in left_out]


@pytest.mark.parametrize(
    ("gains", "times", "outcome", "holds"),
    [
        ((0.01, 0.01, 0.01, 0.01), 10.01, "confirmed", 4),
        ((-0.01, 0.01, 0.01, 0.01), 12, "partly confirmed", 3),
        ((0.0, 0.0, 0.0, 0.01), 12, "partly confirmed", 1),
        ((0.0, 0.0, 0.0, 0.0), 12, "not confirmed", 0),
        ((0.01, 0.01, 0.01, 0.01), 9.99, "not confirmed", 0),
    ],
)
def test_the_outcome_needs_a_better_order_in_a_tenth_of_the_time(
    claims: Claims, gains: tuple[float, ...], times: float, outcome: str, holds: int
) -> None:
    report = claims("label_issues").report(rows(gains, times))
    assert report.outcome == outcome
    assert report.verdict.startswith(f"The claim holds with {holds} of 4 noises.")
    assert report.verdict.count(f", {times:.1f} ({times:.1f}") == 4
    cells = {tuple(row[:3]): row[3:] for row in report.tables[1].rows}
    for noise, gain in zip(NOISES, gains, strict=True):
        difference, ratio = cells[noise, "default", "cleanlab, 5 folds"]
        assert float(difference.split()[0]) == pytest.approx(gain, abs=1e-4)
        assert float(ratio.split()[0]) == pytest.approx(times, abs=0.01)
        other = cells[noise, "default", "loss of the trained network"][0]
        assert float(other.split()[0]) == pytest.approx(gain + 0.01, abs=1e-4)
        last = cells[noise, '`by="margin"`', "cleanlab, 5 folds"]
        assert float(last[0].split()[0]) == pytest.approx(gain - 0.003, abs=1e-4)


def test_what_fails_is_said_first(claims: Claims) -> None:
    verdict = claims("label_issues").report(rows((0.01, -0.01, 0.01, 0.01))).verdict
    assert verdict.index(NOISES[1]) < verdict.index(NOISES[0]) < verdict.index(NOISES[2])


def test_one_seed_confirms_nothing(claims: Claims) -> None:
    assert claims("label_issues").report(rows(seeds=1)).outcome == "not confirmed"


def test_the_tables_have_means_and_rules(claims: Claims) -> None:
    report = claims("label_issues").report(rows())
    cells = {tuple(row[:2]): row[2:] for row in report.tables[0].rows}
    assert len(cells) == 12
    auroc, _, precision, recall, seconds = cells[NOISES[0], "cleanlab, 5 folds"][2:]
    assert auroc == "0.9708 ± 0.0008"
    assert (precision, recall) == ("0.50 ± 0.00", "0.25 ± 0.00")
    assert seconds.startswith("84.0")
    assert cells[NOISES[0], "label_issues"][4:6] == ("", "")
    assert [row[0] for row in report.tables[2].rows] == list(NOISES)
    assert report.tables[2].rows[0][1:3] == ("60,000", "4")
    assert report.tables[2].rows[0][-1] == "-0.0020 (-0.0020 to -0.0020)"
    assert any("2.9.0" in note for note in report.notes)


def test_a_long_training_stands_only_beside_itself(claims: Claims) -> None:
    module = claims("label_issues")
    changes = {"name": module.LONG, "samples": 12_000, "epochs": 40, "auroc": 0.1}
    short = [row for row in rows() if row["name"] == module.LABEL_ISSUES]
    long = [row | changes for row in short if row["rate"] == 0.4]
    report, other = module.report([*rows(), *long]), module.report(rows())
    assert report.verdict == other.verdict
    assert report.tables[:2] == other.tables[:2]
    added = [row for row in report.tables[2].rows if row not in other.tables[2].rows]
    assert [row[:3] for row in added] == [(NOISES[2], "12,000", "40")]


def test_without_cleanlab_or_data_nothing_is_confirmed(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, harness = claims("label_issues"), claims("harness.claim")
    report = module.report(rows(left_out=("cleanlab, 5 folds",)))
    assert report.outcome == "not confirmed"
    assert "pip install cleanlab" in report.verdict
    here = claims("harness.data").Sources(Path(__file__).parent)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = module.settings(harness.Scope(range(2), False, here))
    left = [one for one in found if module.CLAIM.is_possible(one)]
    assert left and all(one["method"] != "cleanlab" for one in left)
    assert len(left) < len(found)


def test_settings_are_complete_distinct_and_fewer_when_quick(claims: Claims) -> None:
    module, harness = claims("label_issues"), claims("harness.claim")
    here = claims("harness.data").Sources(Path(__file__).parent)
    full = module.settings(harness.Scope(range(5), False, here))
    quick = module.settings(harness.Scope(range(2), True, here))
    for found in (full, quick):
        assert len({json.dumps(one, sort_keys=True) for one in found}) == len(found)
        assert all(json.loads(json.dumps(one)) == one for one in found)
    assert sum(one["rate"] == 0 for one in full) == 1
    assert sum(one["rate"] == 0 for one in quick) == 0

    def visits(settings: list[dict[str, Any]]) -> int:
        folds = [max(1, one.get("folds", 1) - 1) for one in settings]
        return sum(
            one["samples"] * one["epochs"] * f for one, f in zip(settings, folds, strict=True)
        )

    assert visits(quick) < visits(full) / 15
    pytest.importorskip("cleanlab", reason="cleanlab is compared where it is installed")
    assert {one["name"] for one in full} == set(module.METHODS)
    assert {one["name"] for one in quick} == set(module.QUICK)
    assert all(one["cleanlab"] for one in full if one["method"] == "cleanlab")


def test_the_look_counts_only_samples_that_were_looked_at(
    claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = claims("label_issues_sheet")
    for name, kind in (("WRONG", {1, 2, 3}), ("AMBIGUOUS", {4, 5}), ("RIGHT", {6})):
        monkeypatch.setattr(module, name, kind)
    assert "Of the 6 " in module.looked_at([1, 2, 3, 4, 5, 6])
    assert module.looked_at([1, 2, 3, 4, 5, 6]).endswith(
        "3 look plainly wrong, 2 ambiguous and 1 right."
    )
    assert module.looked_at([1, 4, 7, 8]).endswith("; 2 were not looked at.")


def test_the_figures(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    module = claims("label_issues")
    figure = claims("harness.page").figure_of(module.CLAIM, rows())
    assert [axes.get_title() for axes in figure.axes] == list(NOISES)

    images = torch.arange(100.0).reshape(100, 1, 1, 1).expand(100, 1, 4, 4)
    target = torch.arange(100) % 10
    data = claims("harness.data").Data(images, target, images, target)
    monkeypatch.setattr(claims("label_issues_sheet"), "load", lambda name, sources: data)
    chosen = list(range(99, 59, -1))
    sheet = {"indices": chosen, "labels": [2] * 40, "predictions": [9] * 40}
    row = {"name": "label_issues", "rate": 0.0, "noise": "symmetric noise", "sheet": sheet}
    figure = Figure()
    module.CLAIM.draw_sheet([*rows(), row], claims("harness.data").Sources(Path("nowhere")), figure)
    assert [axes.images[0].get_array().mean() for axes in figure.axes] == chosen
    assert {axes.get_title() for axes in figure.axes} == {"pullover\n(ankle boot?)"}
    # A training without noise changes nothing else in the report.
    assert module.report([*rows(), row]).verdict == module.report(rows()).verdict
