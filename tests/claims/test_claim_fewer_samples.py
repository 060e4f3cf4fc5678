"""The claim that training can go on with few samples: its trainings and its report."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Claims = Callable[[str], ModuleType]
SETTINGS = {
    "data": "digits",
    "seed": 0,
    "samples": 400,
    "updates": 6,
    "later": 5,
    "batch_norm": True,
    "weight_decay": 0.0,
}


@pytest.fixture
def sources(claims: Claims) -> Any:
    return claims("harness.data").Sources(Path("nothing"))


def test_run(claims: Claims, sources: Any) -> None:
    training = claims("trainings.fewer_samples")
    found = training.run(SETTINGS, sources)
    assert found == training.run(SETTINGS, sources)
    assert found["separated_after"] % 3 == 0  # whole epochs of 400 // 128 updates
    assert found["cut"]["start"]["training_accuracy"] == 100
    assert found["cut"]["start"]["margin"] > 0
    keys = [(one["share"], one["choice"], one["way"]) for one in found["cut"]["reduced"]]
    assert len(set(keys)) == len(keys) == 3 * (3 * 2 + 2)
    assert len(found["later"]["reduced"]) == 4
    assert len(found["closest"]) == len(found["closest_target"]) == 4
    assert len(json.dumps(found)) < 6000


def test_no_separation(claims: Claims, sources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = claims("trainings.fewer_samples")
    monkeypatch.setattr(training, "MOST_EPOCHS", 1)
    assert training.run(SETTINGS, sources) == {"separated_after": None}


@pytest.mark.parametrize("choice", ["smallest", "largest", "random"])
def test_the_kept_samples_make_up_each_batch(claims: Claims, choice: str) -> None:
    training = claims("trainings.fewer_samples")
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(10, (300,), generator=generator)
    logits = torch.rand(300, 10, generator=generator)
    logits[torch.arange(300), target] += 1  # separated
    margins = [
        row[label] - max(row[:label] + row[label + 1 :])
        for row, label in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    order = sorted(range(300), key=margins.__getitem__)
    expected = {"smallest": order[:7], "largest": order[-7:]}
    sampler = training.reduction(logits, target, 7, choice, seed=3)
    batches = list(itertools.islice(training.batches_of(sampler), 100))
    kept = sorted(batches[0].tolist())
    assert all(sorted(batch.tolist()) == kept for batch in batches)
    assert len(set(kept)) == 7
    assert kept == sorted(expected.get(choice, kept))


def test_the_sum_is_the_part_of_the_kept_in_the_mean_of_all(claims: Claims) -> None:
    training = claims("trainings.fewer_samples")
    data = claims("harness.data").Data(*(torch.randn(40, 5), torch.arange(40) % 3) * 2)
    network, optimizer = training.build(data, SETTINGS | {"batch_norm": False})
    before = [one.detach().clone() for one in network.parameters()]
    logits = network(data.train_inputs)
    losses = torch.nn.functional.cross_entropy(logits, data.train_target, reduction="none")
    expected = torch.autograd.grad(losses[:4].sum() / 40, list(network.parameters()))
    training.train(network, optimizer, data, iter([torch.arange(4)]), 1, weight=4 / 40)
    for old, new, gradient in zip(before, network.parameters(), expected, strict=True):
        torch.testing.assert_close(old - 0.05 * gradient, new.detach())


def test_batch_norms_keep_their_statistics(claims: Claims) -> None:
    training = claims("trainings.fewer_samples")
    data = claims("harness.data").Data(*(torch.randn(40, 5), torch.arange(40) % 3) * 2)
    network, optimizer = training.build(data, SETTINGS)
    training.train(network, optimizer, data, iter([torch.arange(40)]), 1)
    before = {name: one.clone() for name, one in network.named_buffers()}
    training.keep_statistics(network)
    training.train(network, optimizer, data, iter([torch.arange(40)]), 1)
    assert all(one.equal(before[name]) for name, one in network.named_buffers())


def rows(claims: Claims, smallest: dict[str, float]) -> list[dict[str, Any]]:
    """Rows in which going on loses so many points, and random samples a tenth."""
    claim = claims("fewer_samples")

    def scores(points: float) -> dict[str, float]:
        return {"accuracy": 90 - points, "training_accuracy": 100 - points, "margin": 1 + points}

    made = []
    for settings in claim.settings(scope(claims, quick=False, data=Path(__file__))):
        reduced = [
            {"share": share, "choice": choice, "way": way}
            | scores((smallest[way] if choice == "smallest" else 0.1) + settings["seed"] / 100)
            for share in claim.SHARES
            for choice in claim.CHOICES
            for way in (*claim.LOSSES, claim.ANEW)
        ]
        found = {"start": scores(0.2), "all": scores(0), "reduced": reduced}
        made.append(
            settings
            | {
                "separated_after": 100,
                "cut": found,
                "later": found,
                "closest": [*range(settings["seed"], settings["seed"] + 100)],
                "closest_target": [0, 1] * 50,
            }
        )
    return made


def scope(claims: Claims, *, quick: bool, data: Path) -> Any:
    sources = claims("harness.data").Sources(data)
    return claims("harness.claim").Scope(range(3), quick, sources)


@pytest.mark.parametrize(
    ("mean", "total", "outcome", "choice"),
    [
        (0, 0.1, "confirmed", ["neither better nor worse than", "better than"]),
        (5, 0.1, "partly confirmed", ["worse than", "neither better nor worse than"]),
        (0.1, 5, "partly confirmed", ["worse than", "neither better nor worse than"]),
        (5, 2, "not confirmed", ["worse than", "worse than"]),
        (-1, -2, "confirmed", ["better than", "better than"]),
    ],
)
def test_report(
    claims: Claims,
    monkeypatch: pytest.MonkeyPatch,
    mean: float,
    total: float,
    outcome: str,
    choice: list[str],
) -> None:
    monkeypatch.setattr(claims("harness.statistics"), "RESAMPLES", 99)
    made = rows(claims, {"mean": mean, "sum": total, "new": 60})
    report = claims("fewer_samples").report(made)
    assert report.outcome == outcome
    sentences = report.verdict.split(". ")[1:]
    for sentence, points, words in zip(
        sentences, sorted((mean, total), reverse=True), choice, strict=False
    ):
        assert f" lose {points + 0.01:.2f} points of test accuracy" in sentence
        assert f": {words} random samples, which lose 0.11" in sentence
    assert "the smallest margins lose 60.0 points and random samples 0.1" in sentences[-1]
    assert all(len(row) == len(table.header) for table in report.tables for row in table.rows)
    # The sets of neighbouring seeds share 19 of 21 samples, those of seeds 0 and 2 18 of 22.
    assert report.tables[-1].rows[-3][1] == f"{(2 * 19 / 21 + 18 / 22) / 3:.2f} ± 0.05"


def test_figure(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims("harness.statistics"), "RESAMPLES", 9)
    made = rows(claims, {"mean": 5, "sum": 1, "new": 60})
    figure = claims("harness.page").figure_of(claims("fewer_samples").CLAIM, made)
    assert [len(ax.lines) for ax in figure.axes] == [16, 16, 11]


def test_report_of_runs_without_separation(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims("harness.statistics"), "RESAMPLES", 9)
    claim = claims("fewer_samples")
    made = rows(claims, {"mean": 0, "sum": 0, "new": 60})
    made[0] = {key: made[0][key] for key in SETTINGS} | {"separated_after": None}
    assert claim.report(made).notes[-1].startswith("Runs that did not reach separation")
    assert claim.report(made[:1]).outcome == claim.report([]).outcome == "not confirmed"


def test_settings(claims: Claims, tmp_path: Path) -> None:
    claim = claims("fewer_samples")
    full, quick = (
        claim.settings(scope(claims, quick=quick, data=tmp_path)) for quick in (False, True)
    )
    assert len(full) == len(quick) == len({json.dumps(one) for one in full}) == 12
    assert all(set(one) == set(SETTINGS) for one in full + quick)
    assert quick[0]["samples"] < full[0]["samples"]
    assert quick[0]["updates"] < full[0]["updates"]
    assert claim.settings(scope(claims, quick=True, data=tmp_path / "nothing")) == []
