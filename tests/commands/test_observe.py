"""The observe command, and what it observes against computations of its own on the same network."""

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

from marginops.observe_figure import draw
from marginops.observe_report import conclusion
from marginops.observer import EpochReport
from marginops.observer import observe as look
from scipy import optimize

import marginops
from marginops import cli, homogeneity, observe
from marginops.training import ClassificationData, InversionMonitor, load_digits

SMALL = ["--epochs", "3", "--batch-size", "64", "--hidden", "24", "12", "--learning-rate", "0.05"]


class Run(NamedTuple):
    printed: str
    written: dict[str, Any]
    figure: bytes
    observation: observe.Observation


def run(*arguments: str | Path) -> int:
    return cli.main(["observe", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now: what it says then is not the command's."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.fixture(scope="module")
def data() -> ClassificationData:
    return load_digits()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs on digits, and the very network that was trained."""
    folder = tmp_path_factory.mktemp("observe")
    kept, lines = [], []

    def watch(*arguments: Any) -> observe.Observation:
        kept.append(original(*arguments))
        return kept[0]

    original = observe.watch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observe, "watch", watch)
        patch.setattr("builtins.print", lambda text, **_: lines.append(text))
        files = ["--output", folder / "figure.png", "--json", folder / "report.json"]
        assert run(*SMALL, "--seed", "1", *files) == 0
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Run("\n".join(lines), written, (folder / "figure.png").read_bytes(), kept[0])


def features_and_logits(
    network: nn.Sequential, data: ClassificationData
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with torch.no_grad():
        features = network[:-1](data.train_inputs)
        logits = network[-1](features)
    return features.double().numpy(), logits.double().numpy(), data.train_target.numpy()


def margins_of(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    own = logits[np.arange(len(target)), target]
    others = logits.copy()
    others[np.arange(len(target)), target] = -np.inf
    return own - others.max(1)


def test_margins(done: Run, data: ClassificationData) -> None:
    _, logits, target = features_and_logits(done.observation.network, data)
    layers = [layer for layer in done.observation.network if isinstance(layer, nn.Linear)]
    product = math.prod(np.linalg.norm(layer.weight.detach().double().numpy()) for layer in layers)
    expected = margins_of(logits, target) / product
    seen, written = done.observation.reports[-1], done.written["epoch"][-1]
    np.testing.assert_allclose(seen.margins.numpy(), expected, rtol=1e-4, atol=1e-6)
    margin = written["margin"]
    assert written["log_norm"] == pytest.approx(math.log(product), rel=1e-5)
    assert margin["area"] == pytest.approx(expected.mean(), rel=1e-4)
    assert margin["minimum"] == pytest.approx(expected.min(), rel=1e-4)
    assert margin["maximum"] == pytest.approx(expected.max(), rel=1e-4)
    assert margin["separation"] == (expected > 0).mean()
    quantiles = np.quantile(expected, done.written["quantile_levels"])
    assert margin["quantiles"] == pytest.approx(quantiles, rel=0.01)
    wrong = logits.argmax(1) != target
    assert 0 < wrong.sum() < len(wrong)
    assert written["training_error"] == wrong.mean()
    assert seen.misclassified.numpy().tolist() == wrong.tolist()
    with torch.no_grad():
        right = done.observation.network(data.test_inputs).argmax(1) == data.test_target
    assert written["test_accuracy"] == right.double().mean().item()


def test_neural_collapse(done: Run, data: ClassificationData) -> None:
    features, logits, target = features_and_logits(done.observation.network, data)
    means = np.stack([features[target == label].mean(0) for label in range(10)])
    centred = means - means.mean(0)
    deviation = features - means[target]
    within = deviation.T @ deviation / len(target)
    between = centred.T @ centred / 10
    weight = done.observation.network[-1].weight.detach().double().numpy()
    nearest = np.linalg.norm(features[:, None] - means, axis=2).argmin(1)
    collapse = done.written["epoch"][-1]["collapse"]
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 10
    assert collapse["nc1"] == pytest.approx(nc1, rel=1e-6)
    for name, rows in (("means", centred), ("weight", weight)):
        norm = np.linalg.norm(rows, axis=1)
        assert collapse[f"nc2_norm_{name}"] == pytest.approx(norm.std() / norm.mean(), rel=1e-6)
        cosine = (rows @ rows.T / np.outer(norm, norm))[~np.eye(10, dtype=bool)]
        assert collapse[f"nc2_angle_{name}"] == pytest.approx(abs(cosine + 1 / 9).mean(), rel=1e-6)
    apart = weight / np.linalg.norm(weight) - centred / np.linalg.norm(centred)
    assert collapse["nc3"] == pytest.approx((apart**2).sum(), rel=1e-6)
    assert collapse["nc4"] == (nearest != logits.argmax(1)).mean() > 0


def test_class_radii(done: Run, data: ClassificationData) -> None:
    features, _, target = features_and_logits(done.observation.network, data)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = [
        np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
        for rows in (unit[target == label] for label in range(10))
    ]
    assert done.written["epoch"][-1]["radius"] == pytest.approx(expected, rel=1e-5)


def test_margins_at_scale_one(done: Run, data: ClassificationData) -> None:
    network = done.observation.network
    depth = {"1": 1, "3": 2, "5": 3}
    rate = {
        f"{layer}.{kind}": (1 if kind == "weight" else number) / 3
        for layer, number in depth.items()
        for kind in ("weight", "bias")
    }
    assert done.written["rates"] == pytest.approx(rate, abs=1e-9)
    square = {
        name: value.double().square().sum().item() for name, value in network.state_dict().items()
    }

    def excess(tau: float) -> float:
        return sum(rate[name] * math.exp(-2 * tau * rate[name]) * square[name] for name in rate) - 1

    tau = optimize.brentq(excess, -50, 50, xtol=1e-12)
    _, logits, target = features_and_logits(network, data)
    smallest = margins_of(logits, target).min()
    last = done.written["epoch"][-1]
    assert last["tau_margin"] == pytest.approx(math.exp(-tau) * smallest, rel=1e-4)
    largest = smallest / math.sqrt(square["5.bias"])
    assert last["lambda_max_margin"] == pytest.approx(largest, rel=1e-4)


def test_what_is_printed_and_written(done: Run) -> None:
    assert (
        "digits: 1,347 training and 450 test samples; MLP 64-24-12-10, batch size 64"
        in done.printed
    )
    rows = re.findall(r"^ +([123]) +([\d.]+) % +([\d.]+) %.* ([\d.]+) +\S+$", done.printed, re.M)
    assert [
        (
            str(epoch),
            f"{100 * seen['training_error']:.2f}",
            f"{100 * seen['test_accuracy']:.2f}",
            f"{np.mean(seen['radius']):.4f}",
        )
        for epoch, seen in enumerate(done.written["epoch"], 1)
    ] == rows
    assert done.written["conclusion"] in done.printed
    settings = {"epochs": 3, "batch_size": 64, "hidden": [24, 12], "learning_rate": 0.05, "seed": 1}
    settings |= {"data": "digits", "regularize": False, "threads": 1, "torch": torch.__version__}
    assert {name: done.written[name] for name in settings} == settings
    assert done.written["inversion"] == [None] * 10
    assert done.written["stragglers"] == []
    assert done.figure.startswith(b"\x89PNG")


def test_conclusion_tells_inversions_and_stragglers(done: Run) -> None:
    monitor = InversionMonitor(3, first_epoch=2)
    target, wrong = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 1, 1]).bool()
    before = dataclasses.replace(done.observation, inversion=monitor)
    assert "a class does not fall: no class." in conclusion(before)
    assert "Stragglers" not in conclusion(before)
    for radius in ([0.5, 0.5, 0.5], [0.5, 0.4, 0.4], [0.4, 0.45, 0.3]):
        monitor.update(torch.tensor(radius), wrong, target)
    text = conclusion(before)
    assert "does not fall: class 0 at 2, 1 at 3; not yet class 2.\n" in text
    assert text.endswith("misclassified at the inversion of their class: 3 of 5 training samples.")


def test_figure_shows_what_was_observed(done: Run, data: ClassificationData) -> None:
    monitor = InversionMonitor(10, first_epoch=2)
    for seen in done.observation.reports:
        monitor.update(seen.manifolds.radius, seen.misclassified, data.train_target)
    reports = list(done.observation.reports)
    reports[2] = dataclasses.replace(reports[2], training_error=0.0)
    shown = dataclasses.replace(done.observation, inversion=monitor, reports=reports)
    margins, collapse, radii, scaled, other = draw(shown, "subtitle").axes
    for line, seen in zip(margins.lines, reports, strict=False):
        drawn = np.asarray(line.get_ydata())
        ordered = seen.margins.sort().values.numpy()
        np.testing.assert_array_equal(
            drawn, ordered[(np.asarray(line.get_xdata()) * 1346).astype(int)]
        )
    for line, name in zip(collapse.lines, ("nc1", "nc2_norm_means"), strict=False):
        expected = [getattr(seen.collapse, name).item() for seen in reports]
        assert np.asarray(line.get_ydata()).tolist() == expected
    curves = [line for line in radii.lines if len(line.get_xdata()) == 3]
    np.testing.assert_array_equal([line.get_ydata() for line in curves], monitor.history.T)
    dots = [line.get_xdata()[0] for line in radii.lines if len(line.get_xdata()) == 1]
    assert dots == [epoch for epoch in monitor.epoch if epoch is not None] != []
    for axes, name in ((scaled, "tau_margin"), (other, "lambda_max_margin")):
        drawn = np.asarray(axes.lines[0].get_ydata())
        np.testing.assert_allclose(drawn, [getattr(seen, name) for seen in reports], rtol=1e-6)
    for axes in (collapse, radii, scaled):
        assert list(axes.lines[-1].get_xdata()) == [3, 3]
    for axes in (margins, collapse, radii, scaled):
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()


def test_observing_leaves_the_network_as_it_was_and_looks_in_evaluation_mode(
    data: ClassificationData,
) -> None:
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, 10),
    )
    network(data.train_inputs)
    network[2].eval()
    before, modes = copy.deepcopy(network.state_dict()), [one.training for one in network.modules()]
    seen = look(network, data, chunk_size=100)
    assert [one.training for one in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network[-1]._forward_pre_hooks
    assert math.isnan(seen.tau_margin) and math.isnan(seen.lambda_max_margin)
    network.eval()
    _, logits, target = features_and_logits(network, data)
    margins = margins_of(logits, target) * math.exp(-seen.log_norm)
    np.testing.assert_allclose(seen.margins.numpy(), margins, rtol=1e-4, atol=1e-6)
    assert_close(look(network, data), seen)


def assert_close(one: EpochReport, other: EpochReport) -> None:
    for field in dataclasses.fields(EpochReport):
        values = getattr(one, field.name), getattr(other, field.name)
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_observing_needs_a_head_and_the_rates_of_the_network(data: ClassificationData) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    with pytest.raises(ValueError, match="pass head="):
        look(network, data)
    rates = homogeneity.rates(network, data.train_inputs[:2])
    seen = look(network, data, head=network[-1], rates=rates)
    assert math.isfinite(seen.tau_margin)
    del rates["1.bias"]
    with pytest.raises(ValueError, match=r"1\.bias"):
        look(network, data, head=network[-1], rates=rates)


def test_quiet_and_regularized(
    done: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--output", tmp_path / "figure.svg", "--json", tmp_path / "report.json"]
    assert run(*SMALL, "--seed", "1", "--regularize", "--quiet", *files) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "multi-margin regularization, seed 1" in printed.out
    assert "NC1" not in printed.out
    # In the first epoch the factor of the regularization is 0.
    first, _, last = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["epoch"]
    assert first == done.written["epoch"][0]
    assert last != done.written["epoch"][2]
