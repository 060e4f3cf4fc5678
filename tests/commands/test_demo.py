"""The demo command: what it prints, writes and refuses."""

import argparse
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

SMALL = ["--updates", "30", "--batch-size", "8", "--candidates", "4", "--hidden", "12", "--quiet"]


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now: what it says then is not the demo's."""
    marginops.select_smallest(torch.zeros(2), 1)


def run(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser(prog="marginops demo")
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([str(argument) for argument in arguments]))


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
    assert [(one["sampling"], one["updates"][-1], one["seed"]) for one in written["runs"]] == [
        (sampling, updates, seed)
        for sampling in ("uniform", "stale_margin", "minimal_margin")
        for updates in (15, 30)
        for seed in (0, 1)
    ]
    for sampling, label, ratio in (
        ("uniform", "uniform", 0),
        ("stale_margin", "stale margins", 0),
        ("minimal_margin", "minimal margin", 4),
    ):
        for updates in (15, 30):
            runs = [
                one
                for one in written["runs"]
                if one["sampling"] == sampling and one["updates"][-1] == updates
            ]
            accuracy = torch.tensor([one["test_accuracy"][-1] for one in runs]).double()
            (line,) = re.findall(rf"^{label} +{updates} .*", printed.out, re.M)
            cells = re.split("  +", line)
            assert cells[2] == f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std():.2f} %"
            assert cells[3:5] == [str(8 * updates), f"{8 * ratio * updates:,}"]
            assert runs[0]["test_accuracy"] != runs[1]["test_accuracy"]
    uniform, stale, minimal = written["runs"][2::4]
    for other in (stale, minimal):
        assert uniform["margin_quantiles_before"] == other["margin_quantiles_before"]
        assert uniform["margin_quantiles_after"] != other["margin_quantiles_after"]
    assert written["target_accuracy"] == pytest.approx(
        sum(one["test_accuracy"][-1] for one in written["runs"][2:4]) / 2
    )
    assert written["unit"] == "CPU seconds"
    assert "The digits are few" in printed.out
    assert "label_issues" not in written


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
    assert ("135/135" in printed.err) is shown
    assert shown or printed.err == ""
    assert "±" not in printed.out


def test_the_learning_rate_rises_and_falls_in_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def note(optimizer: torch.optim.SGD) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(optimizer)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    options = ["--updates", "40", "--seeds", "1", "--learning-rate", "0.04"]
    assert run(*SMALL, *options, "--output", tmp_path / "figure.svg") == 0
    # Three runs of 20 updates come first; then one of 20 and one of 40 for each sampling.
    runs = rates[60:]
    assert len(runs) == 3 * 60
    for begin in range(0, 180, 60):
        short, long = runs[begin : begin + 20], runs[begin + 20 : begin + 60]
        assert short[:3] == pytest.approx([0.04 / 3, 0.08 / 3, 0.04])
        assert long[:5] == pytest.approx([0.008, 0.016, 0.024, 0.032, 0.04])
        assert long[22] == pytest.approx(0.02)
        assert short[2:] == sorted(short[2:], reverse=True)
        assert short[-1] < 0.001 and long[-1] < 0.001


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
