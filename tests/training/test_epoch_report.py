"""The report of an epoch against computations of its own on the same network."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

pytest.importorskip("scipy")
pytest.importorskip("torchmetrics")

from scipy import optimize

from helpers.classifiers import (
    BodyAndHead,
    by_keyword,
    compiled,
    data_parallel,
    group_of_one,
    modes,
    returning_logits,
    returning_mapping,
    returning_more,
)
from helpers.reports import assert_reports_close
from marginops import homogeneity
from marginops.training import EpochReport, report_epoch
from marginops.training.epoch_report import QUANTILES

CLASSES = 5


class Trained(NamedTuple):
    """A network after some training, its samples and its report."""

    network: nn.Sequential
    inputs: Tensor
    target: Tensor
    test_inputs: Tensor
    test_target: Tensor
    rates: dict[str, float]
    report: EpochReport

    @property
    def samples(self) -> dict[str, Tensor]:
        return {"inputs": self.inputs, "target": self.target}

    @property
    def test_samples(self) -> dict[str, Tensor]:
        return {"test_inputs": self.test_inputs, "test_target": self.test_target}

    def features_and_logits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with torch.no_grad():
            features = self.network[:-1](self.inputs)
            logits = self.network[-1](features)
        return features.double().numpy(), logits.double().numpy(), self.target.numpy()


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Gaussian classes that overlap, so that some samples stay misclassified."""
    torch.manual_seed(0)
    target = torch.arange(400) % CLASSES
    inputs = 2 * torch.randn(CLASSES, 12)[target] + torch.randn(400, 12) * 2.5
    cut = slice(0, 300), slice(300, 400)
    network = nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, CLASSES)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(network(inputs[cut[0]]), target[cut[0]]).backward()
        optimizer.step()
    samples = [part[where] for where in cut for part in (inputs, target)]
    rates = homogeneity.rates(network, inputs[:2])
    report = report_epoch(
        network, *samples[:2], test_inputs=samples[2], test_target=samples[3], rates=rates,
        chunk_size=128,
    )  # fmt: skip
    return Trained(network, *samples, rates, report)


@pytest.fixture
def distributed(tmp_path: Path) -> Iterator[None]:
    with group_of_one(tmp_path):
        yield


def margins_of(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    own = logits[np.arange(len(target)), target]
    others = logits.copy()
    others[np.arange(len(target)), target] = -np.inf
    return own - others.max(1)


def test_margins_and_errors(trained: Trained) -> None:
    _, logits, target = trained.features_and_logits()
    layers = [layer for layer in trained.network if isinstance(layer, nn.Linear)]
    product = math.prod(np.linalg.norm(layer.weight.detach().double().numpy()) for layer in layers)
    expected = margins_of(logits, target) / product
    report = trained.report
    np.testing.assert_allclose(report.margins.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert report.log_norm == pytest.approx(math.log(product), rel=1e-5)
    distribution = report.distribution
    assert distribution.area.item() == pytest.approx(expected.mean(), rel=1e-4)
    assert distribution.minimum.item() == pytest.approx(expected.min(), rel=1e-4)
    assert distribution.maximum.item() == pytest.approx(expected.max(), rel=1e-4)
    assert distribution.separation.item() == (expected > 0).mean()
    ordered = np.sort(expected)
    for level, quantile in zip(QUANTILES, distribution.quantiles.tolist(), strict=True):
        rank = level * (len(ordered) - 1)
        low, high = ordered[math.floor(rank) - 1], ordered[math.ceil(rank) + 1]
        assert low - 0.01 * abs(low) <= quantile <= high + 0.01 * abs(high)
    wrong = logits.argmax(1) != target
    assert 0 < wrong.sum() < len(wrong)
    assert report.training_error == wrong.mean()
    assert report.misclassified.numpy().tolist() == wrong.tolist()
    with torch.no_grad():
        right = trained.network(trained.test_inputs).argmax(1) == trained.test_target
    assert report.test_accuracy == right.double().mean().item() != 1 - report.training_error


def test_neural_collapse(trained: Trained) -> None:
    features, logits, target = trained.features_and_logits()
    means = np.stack([features[target == label].mean(0) for label in range(CLASSES)])
    centred = means - means.mean(0)
    deviation = features - means[target]
    within = deviation.T @ deviation / len(target)
    between = centred.T @ centred / CLASSES
    weight = trained.network[-1].weight.detach().double().numpy()
    nearest = np.linalg.norm(features[:, None] - means, axis=2).argmin(1)
    collapse = {name: value.item() for name, value in trained.report.collapse._asdict().items()}
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / CLASSES
    assert collapse["nc1"] == pytest.approx(nc1, rel=1e-6)
    for name, rows in (("means", centred), ("weight", weight)):
        norm = np.linalg.norm(rows, axis=1)
        assert collapse[f"nc2_norm_{name}"] == pytest.approx(norm.std() / norm.mean(), rel=1e-6)
        cosine = (rows @ rows.T / np.outer(norm, norm))[~np.eye(CLASSES, dtype=bool)]
        angle = abs(cosine + 1 / (CLASSES - 1)).mean()
        assert collapse[f"nc2_angle_{name}"] == pytest.approx(angle, rel=1e-6)
    apart = weight / np.linalg.norm(weight) - centred / np.linalg.norm(centred)
    assert collapse["nc3"] == pytest.approx((apart**2).sum(), rel=1e-6)
    assert collapse["nc4"] == (nearest != logits.argmax(1)).mean() > 0


def test_class_radii(trained: Trained) -> None:
    features, _, target = trained.features_and_logits()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = [
        np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
        for rows in (unit[target == label] for label in range(CLASSES))
    ]
    assert trained.report.manifolds.radius.tolist() == pytest.approx(expected, rel=1e-5)


def test_margins_at_scale_one(trained: Trained) -> None:
    # Three layers share the growth of the output; a bias grows as all layers up to its own.
    depth = {"0": 1, "2": 2, "4": 3}
    rate = {
        f"{layer}.{kind}": (1 if kind == "weight" else number) / 3
        for layer, number in depth.items()
        for kind in ("weight", "bias")
    }
    assert trained.rates == pytest.approx(rate, abs=1e-9)
    state = trained.network.state_dict()
    square = {name: value.double().square().sum().item() for name, value in state.items()}

    def excess(tau: float) -> float:
        return sum(rate[name] * math.exp(-2 * tau * rate[name]) * square[name] for name in rate) - 1

    tau = optimize.brentq(excess, -50, 50, xtol=1e-12)
    _, logits, target = trained.features_and_logits()
    smallest = margins_of(logits, target).min()
    assert trained.report.tau_margin == pytest.approx(math.exp(-tau) * smallest, rel=1e-4)
    largest = smallest / math.sqrt(square["4.bias"])
    assert trained.report.lambda_max_margin == pytest.approx(largest, rel=1e-4)


def test_margins_at_scale_one_do_not_underflow() -> None:
    # The norms are large and the logits are not: only the last row of each layer is large.
    network = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(6)])
    for layer in network:
        layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1e9]])
    inputs, target = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0])
    rates = homogeneity.rates(network, inputs)
    report = report_epoch(network, inputs, target, num_classes=2, head=network[-1], rates=rates)
    assert report.margins.tolist() == [0, 0]
    # All six rates are 1/6, so the scale is (6 * 1e18 / 6)^3.
    assert report.tau_margin == pytest.approx(1e-54, rel=1e-6)
    assert report.lambda_max_margin == pytest.approx(1e-54, rel=1e-6)


def test_the_results_of_the_metrics_have_scalars(trained: Trained) -> None:
    report = trained.report
    scalars = report.distribution.scalars()
    assert scalars["mean"] == report.distribution.mean
    assert [scalars[f"quantile_{p}"] for p in QUANTILES] == report.distribution.quantiles.tolist()
    assert report.collapse.scalars()["nc1"] == report.collapse.nc1
    assert report.manifolds.scalars()["samples"] == len(trained.target)


def test_without_test_samples_and_rates(trained: Trained) -> None:
    report = report_epoch(trained.network, **trained.samples)
    unknown = {"test_accuracy": math.nan, "tau_margin": math.nan, "lambda_max_margin": math.nan}
    assert_reports_close(report, dataclasses.replace(trained.report, **unknown))


@pytest.mark.parametrize("log_norm", [0.0, 2, -1.5, torch.tensor(0.5, dtype=torch.float64)])
def test_another_norm_divides_the_margins(trained: Trained, log_norm: Any) -> None:
    report = report_epoch(
        trained.network, **trained.samples, rates=trained.rates, log_norm=log_norm
    )
    _, logits, target = trained.features_and_logits()
    expected = margins_of(logits, target) / math.exp(log_norm)
    np.testing.assert_allclose(report.margins.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert report.log_norm == float(log_norm)
    assert report.distribution.minimum.item() == report.margins.min().item()
    # The margin at scale 1 has its own scale.
    assert report.tau_margin == trained.report.tau_margin


def test_a_network_without_a_norm_product_is_reported_with_a_norm() -> None:
    network = nn.Sequential(nn.EmbeddingBag(9, 6), nn.ReLU(), nn.Linear(6, 3))
    samples = {"inputs": torch.randint(9, (30, 4)), "target": torch.arange(30) % 3}
    with pytest.raises(ValueError, match=r"EmbeddingBag.* for which no norm is defined"):
        report_epoch(network, **samples)
    report = report_epoch(network, **samples, log_norm=0.0)
    with torch.no_grad():
        logits = network(samples["inputs"]).double().numpy()
    expected = margins_of(logits, samples["target"].numpy())
    np.testing.assert_allclose(report.margins.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 77, 300])
def test_chunks_make_no_difference(trained: Trained, chunk_size: int) -> None:
    report = report_epoch(
        trained.network, **trained.samples, **trained.test_samples, rates=trained.rates,
        chunk_size=chunk_size,
    )  # fmt: skip
    assert_reports_close(report, trained.report)


@pytest.mark.parametrize("wrap_head", [lambda layer: layer, parametrizations.spectral_norm])
def test_the_network_evaluates_and_stays_as_it_was(
    wrap_head: Callable[[nn.Module], nn.Module],
) -> None:
    # In training mode, each read of the weight under spectral_norm changes it.
    head = wrap_head(nn.Linear(16, 4))
    network = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), head)
    inputs, target = torch.randn(80, 6), torch.arange(80) % 4
    network(inputs)
    network[1].eval()
    before, training = copy.deepcopy(network.state_dict()), modes(network)
    report = report_epoch(network, inputs, target, test_inputs=inputs, test_target=target)
    assert modes(network) == training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not network[-1]._forward_pre_hooks
    with torch.no_grad():
        logits = network.eval()(inputs)
    margins = margins_of(logits.double().numpy(), target.numpy()) * math.exp(-report.log_norm)
    np.testing.assert_allclose(report.margins.numpy(), margins, rtol=1e-4, atol=1e-6)
    assert report.test_accuracy == logits.argmax(1).eq(target).double().mean().item()
    assert report.training_error == pytest.approx(1 - report.test_accuracy)


@pytest.mark.parametrize("function", [returning_more, returning_mapping, by_keyword])
def test_an_output_with_logits_is_reported_without_a_warning(function: Callable[..., Any]) -> None:
    inputs, target = torch.randn(60, 6), torch.arange(60) % 4
    samples = {"test_inputs": inputs[:20], "test_target": target[:20]}
    plain, other = BodyAndHead(returning_logits), BodyAndHead(function)
    samples["rates"] = homogeneity.rates(other, inputs[:2])
    assert samples["rates"] == homogeneity.rates(plain, inputs[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = report_epoch(other, inputs, target, **samples)
    assert_reports_close(report, report_epoch(plain, inputs, target, **samples))


@pytest.mark.parametrize(
    "wrap",
    [
        data_parallel,
        compiled,
        DistributedDataParallel,
        lambda network: compiled(DistributedDataParallel(network)),
    ],
)
def test_a_wrapped_network_is_reported_as_what_it_wraps(
    trained: Trained, wrap: Callable[[nn.Module], nn.Module], distributed: None
) -> None:
    network = wrap(copy.deepcopy(trained.network))
    device = next(network.parameters()).device
    samples = {
        name: value.to(device) for name, value in (trained.samples | trained.test_samples).items()
    }
    network(samples["inputs"])
    rates = homogeneity.rates(network, samples["inputs"][:2])
    assert rates == trained.rates
    assert_reports_close(report_epoch(network, **samples, rates=rates), trained.report)
    with pytest.raises(ValueError, match=r"rates: expected a rate for every .* none for \['0\."):
        report_epoch(network, **samples, rates={"2.weight": 1.0})


def test_classes_and_head_are_those_that_are_passed(trained: Trained) -> None:
    few = trained.target < 3
    samples = trained.inputs[few], trained.target[few]
    with pytest.raises(ValueError, match=r"no linear layer has 3 outputs .* pass head="):
        report_epoch(trained.network, *samples)
    report = report_epoch(trained.network, *samples, head=trained.network[-1])
    assert report.manifolds.count.tolist() == [60, 60, 60, 0, 0]
    assert_reports_close(report, report_epoch(trained.network, *samples, num_classes=CLASSES))


def test_twin_layers_need_a_head() -> None:
    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4))
    inputs, target = torch.randn(60, 6), torch.arange(60) % 4
    with pytest.raises(ValueError, match=r"several .* 4 outputs \(0, 2\); pass head="):
        report_epoch(network, inputs, target)
    report = report_epoch(network, inputs, target, head=network[2])
    with torch.no_grad():
        hidden = F.normalize(network[:2](inputs)[target == 0].double())
    radius = (hidden - hidden.mean(0)).square().sum(1).mean().sqrt().item()
    assert report.manifolds.radius[0].item() == pytest.approx(radius, rel=1e-5)


class Doubled(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * input


def test_the_weight_has_to_be_passed_where_the_logits_do_not_follow_from_the_head() -> None:
    network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4), Doubled())
    inputs, target = torch.randn(60, 6), torch.arange(60) % 4
    with pytest.raises(
        ValueError, match=r"^head: expected logits F\.linear.* Linear '2'.* weight="
    ):
        report_epoch(network, inputs, target)
    for head in (None, network[2]):
        weight = F.normalize(network[2].weight)
        report = report_epoch(network, inputs, target, head=head, weight=weight)
        assert report.collapse.nc2_norm_weight.item() == pytest.approx(0, abs=1e-6)
    report = report_epoch(network, inputs, target, weight=2 * network[2].weight)
    assert report.collapse.nc2_norm_weight.item() > 0.01


INPUTS, TARGET = torch.zeros(8, 6), torch.arange(8) % 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": [1.0]}, TypeError, "inputs: expected a tensor, got list"),
        ({"inputs": INPUTS[:0], "target": TARGET[:0]}, ValueError, "inputs: expected at least one"),
        ({"target": TARGET.tolist()}, TypeError, r"target: expected a tensor \[N\], got list"),
        ({"target": TARGET.float()}, TypeError, r"target: expected dtype torch\.int64"),
        ({"target": TARGET[:7]}, ValueError, r"target: expected shape \[8\] for inputs \[8, 6\]"),
        ({"target": TARGET[:, None]}, ValueError, r"target: expected shape \[8\] for inputs"),
        ({"head": nn.Linear(6, 4)}, ValueError, "head: expected .* once .* got 0 calls; .*weight="),
        ({"test_inputs": INPUTS}, ValueError, "test_target: expected test_inputs and test_target"),
        ({"test_target": TARGET}, ValueError, "test_inputs: expected test_inputs and test_target"),
        (
            {"test_inputs": INPUTS, "test_target": TARGET[:, None]},
            ValueError,
            r"test_target: expected shape \[8\] for test_inputs \[8, 6\], got \[8, 1\]",
        ),
        (
            {"test_inputs": INPUTS, "test_target": TARGET.tolist()},
            TypeError,
            "test_target: expected a tensor, got list",
        ),
        (
            {"head": nn.ReLU()},
            TypeError,
            r"head: expected a torch\.nn\.Linear, got ReLU of .*; pass weight",
        ),
        ({"head": [], "weight": torch.ones(4, 6)}, TypeError, "head: expected a torch.nn.Module"),
        ({"num_classes": 4, "weight": torch.ones(3, 6)}, ValueError, "weight: expected 4 rows"),
        ({"weight": nn.Linear(6, 4)}, TypeError, r"weight: .* got Linear; pass \.weight"),
        (
            {"test_inputs": INPUTS, "test_target": TARGET.int()},
            TypeError,
            r"test_target: expected dtype torch\.int64 .*; pass test_target\.long\(\)",
        ),
        ({"num_classes": 3}, ValueError, "network: no linear layer has 3 outputs"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1, got 0"),
        ({"log_norm": "1"}, TypeError, "log_norm: expected a float or a 0-d tensor, got str"),
        ({"log_norm": torch.ones(2)}, ValueError, r"log_norm: expected shape \[\] "),
        ({"rates": [1.0]}, TypeError, "rates: expected a mapping of names, got list"),
        ({"rates": {"weight": 1.0}}, ValueError, r"rates: expected a rate .* none for \['bias'\]"),
    ],
)
def test_errors_name_the_argument(arguments, error, message) -> None:
    given = {"inputs": INPUTS, "target": TARGET, **arguments}
    with pytest.raises(error, match=f"^{message}"):
        report_epoch(nn.Linear(6, 4), **given)


def test_a_target_beyond_the_classes_is_named() -> None:
    network = nn.Linear(6, 4)
    with pytest.raises(RuntimeError, match=r"target: expected classes in \[0, 4\).* got 4"):
        report_epoch(network, INPUTS, TARGET + 1, head=network)
