"""The demo command: what it prints, writes and refuses."""

import argparse
import dataclasses
import gzip
import json
import re
import struct
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import marginops
from marginops.commands.demo import run as demo
from marginops.commands.demo.figure import draw
from marginops.commands.demo.loop import TrainingHistory
from marginops.commands.demo.report import Results, conclusion

SMALL = ["--updates", "30", "--batch-size", "8", "--candidates", "4", "--hidden", "12", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now: what it says then is not the demo's."""
    marginops.select_smallest(torch.zeros(2), 1)


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="marginops demo")
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([str(argument) for argument in arguments]))


def results(uniform: list[float], selected: list[float]) -> Results:
    """Histories that end with the given accuracies; selection takes three times as long."""
    generator = torch.Generator().manual_seed(0)

    def history(sampling: str, accuracy: float, seconds: float) -> TrainingHistory:
        return TrainingHistory(
            sampling=sampling,
            updates=(0, 50, 100),
            seconds=(0.0, seconds / 2, seconds),
            test_accuracy=(0.1, accuracy - 0.1, accuracy),
            samples_trained=1600,
            samples_scored=16000 if sampling == "minimal_margin" else 0,
            margins_before=torch.randn(200, generator=generator),
            margins_after=torch.randn(200, generator=generator) + 5,
        )

    return {
        "uniform": [history("uniform", accuracy, 2.0) for accuracy in uniform],
        "minimal_margin": [history("minimal_margin", accuracy, 6.0) for accuracy in selected],
    }


def test_demo_prints_the_table_and_writes_figure_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, report = tmp_path / "figure.png", tmp_path / "report.json"
    threads = torch.get_num_threads()
    assert run(*SMALL, "--seeds", "2", "--output", figure, "--json", report) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "digits: 1,347 training and 450 test samples; MLP 64-12-10" in printed.out
    assert figure.read_bytes().startswith(b"\x89PNG")
    written = json.loads(report.read_text(encoding="utf-8"))
    assert written["conclusion"] in printed.out
    assert [(one["sampling"], one["seed"]) for one in written["runs"]] == [
        ("uniform", 0), ("uniform", 1), ("minimal_margin", 0), ("minimal_margin", 1)
    ]  # fmt: skip
    for sampling, label, scored in (
        ("uniform", "uniform", "0"),
        ("minimal_margin", "minimal margin", "960"),
    ):
        runs = [one for one in written["runs"] if one["sampling"] == sampling]
        accuracy = torch.tensor([one["test_accuracy"][-1] for one in runs], dtype=torch.float64)
        (line,) = (row for row in printed.out.splitlines() if row.startswith(f"{label}  "))
        cells = line.removeprefix(label).split()
        assert cells[:4] == [
            f"{100 * accuracy.mean():.2f}",
            "±",
            f"{100 * accuracy.std():.2f}",
            "%",
        ]
        assert cells[4:7] == ["30", "240", scored]
        assert runs[0]["test_accuracy"] != runs[1]["test_accuracy"]
    first, other = written["runs"][0], written["runs"][2]
    assert first["margin_quantiles_before"] == other["margin_quantiles_before"]
    assert first["margin_quantiles_after"] != other["margin_quantiles_after"]


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_progress_is_shown_on_a_terminal_unless_quiet(
    terminal: bool,
    quiet: bool,
    shown: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    options = [option for option in SMALL if quiet or option != "--quiet"]
    assert run(*options, "--seeds", "1", "--output", tmp_path / "figure.svg") == 0
    printed = capsys.readouterr()
    assert ("60/60" in printed.err) is shown
    assert shown or printed.err == ""
    assert "±" not in printed.out


@pytest.mark.parametrize(
    ("uniform", "selected", "expected"),
    [
        (
            [0.90, 0.91],
            [0.95, 0.96],
            r"\+5.00 points. This is more than .*, so minimal-margin selection wins\.",
        ),
        (
            [0.95, 0.96],
            [0.90, 0.91],
            r"-5.00 points. This is more than .*, so uniform sampling wins\.",
        ),
        (
            [0.90, 0.94],
            [0.91, 0.94],
            r"\+0.50 points. This is within .*\(2.83 points\), so there is no clear winner\.",
        ),
        ([0.90], [0.95], r"\+5.00 points. One seed does not show whether"),
    ],
)
def test_conclusion_says_what_happened(
    uniform: list[float], selected: list[float], expected: str
) -> None:
    sentence = conclusion(results(uniform, selected), 10)
    assert re.search(expected, sentence), sentence
    assert sentence.startswith("After 100 updates, ")
    assert sentence.endswith(" and took 3.0 times as long.")


def test_a_single_update_is_one() -> None:
    shown = results([0.5], [0.5])
    once = {name: [dataclasses.replace(runs[0], updates=(0, 1))] for name, runs in shown.items()}
    assert conclusion(once, 10).startswith("After 1 update, ")


@pytest.mark.parametrize("seeds", [1, 2])
def test_figure_shows_the_runs(seeds: int) -> None:
    shown = results([0.90, 0.94][:seeds], [0.97, 0.95][:seeds])
    figure = draw(shown, "subtitle")
    by_update, by_second, margins = figure.axes
    for axes, x in ((by_update, [[0, 50, 100]] * 2), (by_second, [[0, 1, 2], [0, 3, 6]])):
        for line, expected, runs in zip(axes.lines, x, shown.values(), strict=True):
            assert line.get_xdata().tolist() == expected
            mean = torch.tensor([one.test_accuracy for one in runs]).mean(0)
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()), mean)
    shares = [patch.get_data().values.sum() for patch in margins.patches]
    assert shares == pytest.approx([1, 1, 1], abs=0.02)
    for axes in figure.axes:
        assert axes.get_title() and axes.get_xlabel() and axes.get_ylabel()
        assert axes.get_legend() is not None


def test_figure_of_equal_margins_and_a_long_title() -> None:
    shown = results([0.5], [0.5])
    equal = {
        name: [
            dataclasses.replace(
                run, margins_before=torch.zeros(9), margins_after=torch.zeros(9), updates=(0, 1, 2)
            )
            for run in runs
        ]
        for name, runs in shown.items()
    }
    figure = draw(equal, "MLP " + "-".join(["64"] * 99))
    figure.draw_without_rendering()
    by_update, _, margins = figure.axes
    for patch in margins.patches:
        shares, edges, _ = patch.get_data()
        assert shares.sum() == 1 and edges[0] < 0 < edges[-1]
    assert all(tick == int(tick) for tick in by_update.get_xticks())
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


def test_no_legend_of_the_figure_covers_a_curve() -> None:
    figure = draw(results([0.9, 0.94], [0.97, 0.95]), "subtitle")
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0


def test_fashion_mnist_files_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 60), ("t10k", 20)):
        pixels = torch.randint(256, (count * 784,), generator=torch.Generator().manual_seed(count))
        images = struct.pack(">4I", 0x803, count, 28, 28) + bytes(pixels.tolist())
        labels = struct.pack(">2I", 0x801, count) + bytes(value % 10 for value in range(count))
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(labels)
    options = ["--data", "fashion-mnist", "--data-dir", tmp_path, "--seeds", "1"]
    assert run(*SMALL, *options, "--output", tmp_path / "figure.png") == 0
    assert (
        "fashion-mnist: 60 training and 20 test samples; MLP 784-12-10" in capsys.readouterr().out
    )
