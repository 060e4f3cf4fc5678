"""The observe command: what it trains, prints, writes and draws."""

import dataclasses
import itertools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

import marginops
from helpers.reports import assert_reports_close
from marginops import homogeneity
from marginops.commands import cli
from marginops.commands.data import ClassificationData, load_digits
from marginops.commands.observe import loop
from marginops.commands.observe.figure import draw
from marginops.commands.observe.report import conclusion
from marginops.training import InversionMonitor, report_epoch
from marginops.training.epoch_report import QUANTILES

SMALL = ["--epochs", "3", "--batch-size", "64", "--hidden", "24", "12", "--learning-rate", "0.05"]


class Run(NamedTuple):
    printed: str
    written: dict[str, Any]
    figure: bytes
    observation: loop.Observation


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

    def watch(*arguments: Any) -> loop.Observation:
        kept.append(original(*arguments))
        return kept[0]

    original = loop.watch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "watch", watch)
        patch.setattr("builtins.print", lambda text, **_: lines.append(text))
        files = ["--output", folder / "figure.png", "--json", folder / "report.json"]
        assert run(*SMALL, "--seed", "1", *files) == 0
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Run("\n".join(lines), written, (folder / "figure.png").read_bytes(), kept[0])


def test_the_last_report_is_that_of_the_trained_network(
    done: Run, data: ClassificationData
) -> None:
    network, last = done.observation.model.network, done.observation.reports[-1]
    report = report_epoch(
        network,
        data.train_inputs,
        data.train_target,
        test_inputs=data.test_inputs,
        test_target=data.test_target,
        rates=homogeneity.rates(network, data.train_inputs[:2]),
    )
    assert_reports_close(last, report)
    assert math.isfinite(last.tau_margin)
    assert last.test_accuracy > done.observation.reports[0].test_accuracy


def test_what_is_written_is_what_was_seen(done: Run) -> None:
    observation, written = done.observation, done.written
    assert written["rates"] == observation.rates
    assert set(written["rates"]) == {
        name for name, _ in observation.model.network.named_parameters()
    }
    assert written["quantile_levels"] == list(QUANTILES)
    assert len(observation.reports) == len(written["epoch"]) == 3
    for seen, epoch in zip(observation.reports, written["epoch"], strict=True):
        numbers = ("training_error", "test_accuracy", "log_norm", "tau_margin", "lambda_max_margin")
        assert {name: epoch[name] for name in numbers} == {
            name: getattr(seen, name) for name in numbers
        }
        assert len(epoch["margin"]) == 6 and len(epoch["collapse"]) == 7
        for summary, part in ((seen.distribution, "margin"), (seen.collapse, "collapse")):
            for name, value in epoch[part].items():
                assert value == getattr(summary, name).tolist()
        assert epoch["radius"] == seen.manifolds.radius.tolist()
    radii = [seen.manifolds.radius.tolist() for seen in observation.reports]
    assert observation.inversion.history.tolist() == radii


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
    # The run has three epochs.
    assert "its radius does not fall: no class." in conclusion(before)
    late = dataclasses.replace(done.observation, inversion=InversionMonitor(3, first_epoch=4))
    assert (
        "epoch from 4 on in which its radius does not fall: not looked for, because the training "
        "ended in epoch 3."
    ) in conclusion(late)
    assert "stragglers" not in conclusion(before)
    for radius in ([0.5, 0.5, 0.5], [0.5, 0.4, 0.4], [0.4, 0.45, 0.3]):
        monitor.update(torch.tensor(radius), wrong, target)
    text = conclusion(before)
    assert "does not fall: class 0 at 2, 1 at 3; not yet class 2.\n" in text
    assert text.endswith(
        "3 of 5 training samples are stragglers, misclassified at the inversion of their class."
    )


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


@pytest.mark.parametrize("errors", [(0.5, 0.25, 0.125), (0.0, 0.0, 0.0)])
def test_figure_of_a_network_without_norms_and_rates(done: Run, errors: tuple[float, ...]) -> None:
    reports = [
        dataclasses.replace(seen, training_error=error, test_accuracy=1 - error / 2)
        for seen, error in zip(done.observation.reports, errors, strict=True)
    ]
    shown = dataclasses.replace(done.observation, rates=None, log_norm=0.0, reports=reports)
    assert draw(done.observation, "").axes[0].get_ylabel().startswith("margin / product of layer")
    figure = draw(shown, "subtitle")
    figure.draw_without_rendering()
    margins, _, _, shares = figure.axes
    assert margins.get_ylabel() == "margin\n(below 0: misclassified)"
    assert shares.get_title() == "Misclassified samples"
    training, test = (np.asarray(line.get_ydata()) for line in shares.lines[:2])
    np.testing.assert_allclose(training, errors, rtol=1e-6)
    np.testing.assert_allclose(test, np.asarray(errors) / 2, atol=1e-7)
    bottom = shares.transData.inverted().transform((0, shares.get_legend().get_window_extent().y0))[
        1
    ]
    assert max(errors) < bottom


def many(done: Run, epochs: int, **changes: Any) -> loop.Observation:
    """A run of so many epochs: those of ``done`` again and again, with changes to each report."""
    monitor = InversionMonitor(10, first_epoch=2)
    target = torch.zeros(1347, dtype=torch.int64)
    reports = []
    for epoch in range(epochs):
        seen = dataclasses.replace(done.observation.reports[epoch % 3], **changes)
        monitor.update(seen.manifolds.radius, seen.misclassified, target)
        reports.append(seen)
    return dataclasses.replace(done.observation, inversion=monitor, reports=reports)


@pytest.mark.parametrize("epochs", [1, 2, 12, 300])
def test_ticks_are_epochs_and_no_text_lies_on_another(done: Run, epochs: int) -> None:
    shown = many(done, epochs, training_error=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(shown, "subtitle")
        figure.draw_without_rendering()
    margins, collapse, radii, scaled, _ = figure.axes
    (inset,) = margins.child_axes
    for axes in (collapse, radii, scaled, inset):
        lowest, highest = axes.get_xlim()
        labels = [
            label
            for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            if lowest <= place <= highest
        ]
        assert labels and all(re.fullmatch(r"\d+", label.get_text()) for label in labels)
        extents = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))
        assert not any(label.get_text() for label in axes.get_xticklabels(minor=True))
    legend, small = margins.get_legend().get_window_extent(), inset.get_tightbbox()
    assert not legend.overlaps(small)
    assert small.x0 > margins.get_window_extent().x0
    # Every curve stays below the legend and the small axes.
    bottom = margins.transData.inverted().transform((0, min(legend.y0, small.y0)))[1]
    assert all(np.max(line.get_ydata()) < bottom for line in margins.lines)
    if epochs == 1:
        assert all(line.get_marker() == "." for line in (*collapse.lines[:5], scaled.lines[0]))


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf, 1e-30, -2.0])
def test_figure_of_values_that_a_logarithm_does_not_have(done: Run, value: float) -> None:
    collapse = type(done.observation.reports[0].collapse)(*[torch.tensor(value)] * 7)
    shown = many(done, 4, collapse=collapse, tau_margin=value, lambda_max_margin=-value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw(shown, "MLP " + "-".join(["64"] * 99))
        figure.draw_without_rendering()
    for axes in figure.axes:
        assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
    *_, scaled, other = figure.axes
    zeros = [axes.transData.transform((1, 0))[1] for axes in (scaled, other)]
    assert zeros[0] == pytest.approx(zeros[1])
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


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
