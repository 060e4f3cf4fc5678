"""Flipped labels of the demo, and what its report says of them."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import marginops
from helpers.demo_results import results
from marginops.commands import cli
from marginops.commands.data import ClassificationData, load_digits
from marginops.commands.demo import loop
from marginops.commands.demo.figure import draw
from marginops.commands.demo.noise import find_flipped, flip_labels
from marginops.training import TrainingDynamics, mislabelled_share


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now: what it says then is not the demo's."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.mark.parametrize("share", [0.2, 0.01, 0.0])
def test_labels_are_flipped_to_every_other_class(share: float) -> None:
    digits = load_digits()
    noisy, flipped = flip_labels(digits, share, 7)
    assert flipped.sum() == round(share * 1347)
    assert torch.equal(noisy.train_target != digits.train_target, flipped)
    assert noisy.train_target.min() >= 0 and noisy.train_target.max() <= 9
    assert torch.equal(noisy.test_target, digits.test_target)
    assert torch.equal(flip_labels(digits, share, 7)[0].train_target, noisy.train_target)
    if share == 0.2:
        assert not torch.equal(flip_labels(digits, share, 8)[1], flipped)
        steps = (noisy.train_target - digits.train_target)[flipped] % 10
        # Each of nine classes is expected 30 times.
        assert (steps.bincount(minlength=10)[1:] > 10).all()


def test_labels_of_a_subset_of_samples_are_flipped() -> None:
    target = torch.zeros(4000, dtype=torch.int64)
    data = ClassificationData("one", 5, torch.zeros(4000, 1), target, torch.zeros(1, 1), target[:1])
    noisy, flipped = flip_labels(data, 0.5, 0)
    assert (noisy.train_target[flipped].bincount(minlength=5)[1:] - 500).abs().max() < 100
    assert not data.train_target.any()
    # No part of the samples has more of them.
    assert all(abs(part.double().mean() - 0.5) < 0.1 for part in flipped.split(1000))


def dynamics_of(margins: Tensor) -> TrainingDynamics:
    """Dynamics that saw each of the first samples once, with these margins."""
    dynamics = TrainingDynamics(len(margins) + 2)
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    target = torch.zeros(len(margins), dtype=torch.int64)
    dynamics.update(torch.arange(len(margins)), logits, target)
    return dynamics


def test_what_was_found_is_counted() -> None:
    flipped = torch.tensor([True, False, True, False, False, True, False])
    report = find_flipped(dynamics_of(torch.tensor([-3.0, 1.0, 2.0, -1.0, 3.0])), flipped)
    # By suspicion: 0, 3, 1, 2, 4, and then 5 and 6, which were never seen.
    assert report.found == 1
    # Of 3 * 4 pairs these are in order: all four of 0, two of 2 and one of 5.
    assert report.auroc == pytest.approx(7 / 12)
    assert report.average_precision == pytest.approx((1 / 1 + 2 / 4 + 3 / 6) / 3)
    assert report.data_map.indices.tolist() == [0, 1, 2, 3, 4]
    assert report.text().startswith(
        "3 of the 7 training labels are flipped. Of the 3 most suspicious samples after a uniform "
        "run, 1 have a flipped label; by chance it would be 1."
    )
    assert report.numbers()["flipped"] == 3


def test_the_figure_has_a_data_map() -> None:
    flipped = torch.tensor([True, False, True, False, False])
    report = find_flipped(dynamics_of(torch.tensor([-3.0, 1.0, 2.0])), flipped)
    shown = results([0.9, 0.94], [0.97, 0.95], [0.9, 0.9])
    figure = draw(shown, "MLP " + "-".join(["64"] * 99), "seconds", report)
    figure.draw_without_rendering()
    *axes, data_map, _ = figure.axes
    assert [len(part.get_offsets()) for part in data_map.collections] == [3, 2]
    assert data_map.get_title() and data_map.get_xlabel() == "variability"
    assert all(one.get_legend() is not None for one in axes)
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


def test_the_demo_finds_flipped_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[TrainingDynamics] = []

    def note(dynamics: TrainingDynamics) -> float:
        asked.append(dynamics)
        return mislabelled_share(dynamics)

    monkeypatch.setattr(loop, "mislabelled_share", note)
    options = ["--updates", "300", "--batch-size", "32", "--candidates", "4", "--quiet"]
    files = ["--output", str(tmp_path / "figure.png"), "--json", str(tmp_path / "report.json")]
    arguments = ["demo", *options, "--seeds", "1", "--label-noise", "0.2", *files]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    written = json.loads((tmp_path / "report.json").read_text())
    issues = written["label_issues"]
    assert written["label_noise"] == 0.2 and issues["flipped"] == 269
    # By chance it would be 54.
    assert issues["found"] > 200
    assert issues["auroc"] > 0.95 and issues["average_precision"] > 0.9
    assert f"{issues['found']} have a flipped label; by chance it would be 54." in printed.out
    assert "leave out what looks mislabelled" in printed.out
    # Stale margins ask once all samples were seen.
    assert asked and all((dynamics.count > 0).all() for dynamics in asked)
    assert re.search(r"^label_issues: AUROC 0\.9\d{3}, average precision", printed.out, re.M)


@pytest.mark.parametrize("share", ["0.0001", "0.9999"])
def test_a_share_that_flips_none_or_all_is_refused(
    share: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--output", str(tmp_path / "figure.png")]
    assert cli.main(["demo", "--label-noise", share, *files]) == 2
    message = (
        "marginops demo: --label-noise: expected 0 or a share that changes some but not all of the "
        f"1347 training labels, got {share}\n"
    )
    assert capsys.readouterr().err == message
