"""The claim about the area under the margins: its trainings, its report and its settings."""

import copy
import json
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

Claims = Callable[[str], ModuleType]
NORMALISERS = [f"{norm} {reading}" for norm in ("frobenius", "spectral") for reading in
               ("fold", "last", "affine")]  # fmt: skip


def tiny(architecture: str, **others: Any) -> dict[str, Any]:
    return {
        "data": "digits", "architecture": architecture, "seed": 3, "share": 0.0, "scale": 1.0,
        "batch_size": 32, "learning_rate": 0.05, "samples": 96, "epochs": 60, "loss": 0.05,
    } | others  # fmt: skip


@pytest.fixture(autouse=True)
def few_resamples(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims("harness.correlation"), "RESAMPLES", 99)


@pytest.fixture
def sources(claims: Claims, tmp_path: Any) -> Any:
    return claims("harness.data").Sources(tmp_path / "missing")


def test_run_separates_and_repeats(claims: Claims, sources: Any) -> None:
    training = claims("trainings.margin_area")
    row = training.run(tiny("perceptron", share=0.5), sources)
    assert row["separates"]
    assert row["train_error"] == 0
    assert row["train_loss"] <= 0.05
    assert 0 < row["pre_epochs"] <= 60
    assert 0 < row["test_error"] < 0.5
    again = training.run(tiny("perceptron", share=0.5), sources)
    assert row | {"training_seconds": 0} == again | {"training_seconds": 0}
    assert len(json.dumps(row)) < 2000


def test_network_that_does_not_separate_has_no_statistics(claims: Claims, sources: Any) -> None:
    row = claims("trainings.margin_area").run(tiny("perceptron", epochs=1), sources)
    assert not row["separates"]
    assert row["statistics"] == {}
    assert row["pre_epochs"] == 0


def test_statistics_are_those_of_the_weights(claims: Claims) -> None:
    training = claims("trainings.margin_area")
    torch.manual_seed(0)
    inputs, target = torch.randn(50, 1, 8, 8), torch.randint(10, (50,))
    network = training.network_of("perceptron", inputs, 10)
    training.scale_weights(network, 4.0)
    found = training.statistics_of(network, inputs, target)

    logits = network(inputs).detach().double()
    correct = logits.gather(1, target[:, None])[:, 0]
    margins = correct - logits.scatter(1, target[:, None], -math.inf).amax(1)
    weights = [weight.detach().double() for weight in network.parameters()]
    for norm, order in (("frobenius", "fro"), ("spectral", 2)):
        product = math.prod(torch.linalg.matrix_norm(weight, order).item() for weight in weights)
        expected = (margins / product).numpy()
        one = found[f"{norm} fold"]
        assert one["norm"] == pytest.approx(math.log(product), rel=1e-5)
        assert one["rank"] == pytest.approx(expected.mean(), rel=1e-4)
        cdf = (expected.max() - expected.clip(0)).mean()
        assert one["cdf"] == pytest.approx(cdf, rel=1e-4)
        assert one["smallest"] == pytest.approx(expected.min(), rel=1e-4)
        assert one["tenth"] == pytest.approx(np.quantile(expected, 0.1), rel=1e-4)
    assert found["none"]["rank"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert set(found) == {"none", "bartlett", "frobenius fold", "spectral fold"}


def test_batch_norm_has_every_reading(claims: Claims) -> None:
    training = claims("trainings.margin_area")
    inputs, target = torch.randn(50, 1, 8, 8), torch.randint(10, (50,))
    network = training.network_of("batch norm", inputs, 10)
    network(inputs)
    found = training.statistics_of(network, inputs, target)
    assert set(found) == {"none", "bartlett", *NORMALISERS}
    last = [*network.parameters()][-1]
    assert found["frobenius last"]["norm"] == pytest.approx(last.norm().log().item(), rel=1e-5)


def test_scaled_perceptron_has_the_same_normalised_margins(claims: Claims) -> None:
    training = claims("trainings.margin_area")
    inputs, target = torch.randn(50, 1, 8, 8), torch.randint(10, (50,))
    network = training.network_of("perceptron", inputs, 10)
    scaled = copy.deepcopy(network)
    training.scale_weights(scaled, 3.0)
    one, other = (training.statistics_of(net, inputs, target) for net in (network, scaled))
    assert other["none"]["rank"] == pytest.approx(27 * one["none"]["rank"], rel=1e-4)
    for name in ("frobenius fold", "spectral fold", "bartlett"):
        assert other[name]["rank"] == pytest.approx(one[name]["rank"], rel=1e-4)


def test_share_of_random_labels(claims: Claims) -> None:
    training = claims("trainings.margin_area")
    target = torch.zeros(1000, dtype=torch.int64)
    for share in (0.2, 1.0):
        labels = training.partly_random(target, share, 10, seed=0)
        assert (labels != 0).double().mean().item() == pytest.approx(0.9 * share, abs=0.04)
    assert not target.any()


def synthetic(claim: ModuleType, area: Callable[[float, float], float]) -> list[dict[str, Any]]:
    """Rows of networks whose area is a function of their test error and of chance."""
    generator = np.random.default_rng(0)
    rows = []
    for one in claim.settings(scope(claim, range(8))):
        error = 0.15 + 0.05 * one["share"] + 0.01 * generator.random()
        normalisers = NORMALISERS if one["architecture"] == "batch norm" else NORMALISERS[::3]
        statistics = {
            name: dict.fromkeys(("cdf", "smallest", "tenth", "norm"), generator.random())
            | {"rank": generator.random()}
            for name in ["none", *normalisers, "bartlett"]
        }
        statistics["frobenius fold"]["rank"] = area(error, generator.random())
        rows.append(one | {"separates": True, "test_error": error, "statistics": statistics})
    return rows


class Everything:
    def has(self, name: str) -> bool:
        return True


def scope(claim: ModuleType, seeds: range, quick: bool = False, sources: Any = None) -> Any:
    return claim.Scope(seeds, quick, sources or Everything())


def test_report_confirms(claims: Claims) -> None:
    claim = claims("margin_area")
    rows = synthetic(claim, lambda error, chance: 1 / error)
    rows[0]["separates"] = False
    report = claim.report(rows)
    assert report.outcome == "confirmed"
    assert "not clearly" not in report.verdict
    assert report.notes[0].startswith("1 of 96 ")
    assert "1.00 (1.00 to 1.00)" in report.tables[0].rows[0]


def test_report_does_not_confirm(claims: Claims) -> None:
    claim = claims("margin_area")
    report = claim.report(synthetic(claim, lambda error, chance: chance))
    assert report.outcome == "not confirmed"
    assert (
        "falls short of 0.8 for the convolutions with batch norm and the perceptrons"
        in report.verdict
    )
    assert "not clearly above 0" in report.verdict
    opposite = claim.report(synthetic(claim, lambda error, chance: error))
    assert opposite.outcome == "not confirmed"
    assert "-1.00" in opposite.verdict


def test_report_confirms_partly(claims: Claims) -> None:
    claim = claims("margin_area")
    rows = synthetic(claim, lambda error, chance: chance)
    for row in rows:
        row["statistics"]["spectral fold"]["cdf"] = 1 - row["test_error"]
    report = claim.report(rows)
    assert report.outcome == "partly confirmed"
    assert "Spectral" in report.verdict


def test_correlations_are_those_of_scipy(claims: Claims) -> None:
    correlation = claims("harness.correlation")
    first, second = np.random.default_rng(0).integers(0, 12, (2, 30)).astype(float)
    assert correlation.spearman(first, second) == pytest.approx(stats.spearmanr(first, second)[0])
    assert correlation.kendall(first, second) == pytest.approx(stats.kendalltau(first, second)[0])
    interval = correlation.correlation_interval(correlation.spearman, first, second)
    assert interval.low < interval.value < interval.high


def test_correlation_within_groups_ignores_their_differences(claims: Claims) -> None:
    interval_within = claims("harness.correlation").interval_within
    groups = np.repeat([0, 1, 2], 8)
    inside = np.tile(np.arange(8.0), 3)
    same = interval_within(100 * groups + inside, inside - 100 * groups, groups)
    assert (same.value, same.low, same.high) == pytest.approx((1, 1, 1))


def test_settings_are_a_complete_design(claims: Claims, sources: Any) -> None:
    claim = claims("margin_area")
    full = claim.settings(scope(claim, range(8)))
    quick = claim.settings(scope(claim, range(claim.CLAIM.quick_seeds), quick=True))
    texts = [json.dumps(one, sort_keys=True) for one in full]
    assert len(set(texts)) == len(full) == 96
    assert len(quick) <= len(full) / 4
    varied = ("architecture", "share", "scale", "batch_size", "learning_rate")
    assert len({tuple(one[name] for name in varied) for one in full}) == 96
    assert claim.settings(scope(claim, range(8), sources=sources)) == []
    assert claim.report([]).outcome == "not confirmed"


def test_figure_has_all_panels(claims: Claims) -> None:
    claim = claims("margin_area")
    rows = synthetic(claim, lambda error, chance: 1 / error)
    figure = claims("harness.page").figure_of(claim.CLAIM, rows)
    assert len(figure.axes) == 4  # with a bar of colours
