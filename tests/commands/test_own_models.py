"""The commands with a data set and a network of the user: what they take and what they refuse."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")

import marginops
from helpers.user_modules import user_modules
from marginops.commands import cli

SMALL = {
    "demo": ["--updates", "20", "--seeds", "1", "--batch-size", "16", "--candidates", "2"],
    "observe": ["--epochs", "2", "--batch-size", "64"],
}


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now: what it says then is not the command's."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.fixture(params=SMALL)
def command(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with user_modules(tmp_path):
        yield tmp_path


def run(command: str, *options: str) -> dict[str, Any]:
    files = ["--output", "figure.png", "--json", "report.json"]
    assert cli.main([command, *SMALL[command], *files, *options]) == 0
    assert Path("figure.png").read_bytes().startswith(b"\x89PNG")
    return json.loads(Path("report.json").read_text(encoding="utf-8"))


def test_own_data_and_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(command, "--data", "own.data:images", "--model", "own.models:conv")
    printed = capsys.readouterr()
    assert printed.err == "" or command == "demo"  # the progress
    assert "own.data:images: 150 training and 30 test samples; own.models:conv, " in printed.out
    assert (written["data"], written["model"]) == ("own.data:images", "own.models:conv")
    assert written["hidden"] is None
    assert "not divided" not in printed.out and "left out" not in printed.out
    if command == "observe":
        assert written["left_out"] == []
        assert len(written["rates"]) == 6
        assert all(math.isfinite(epoch["tau_margin"]) for epoch in written["epoch"])
        assert written["epoch"][1]["training_error"] < 0.7


def test_own_data_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = run(command, "--data", "own.data:arrays", "--hidden", "8")
    tensors = run(command, "--data", "own.data:images", "--hidden", "8")
    assert "MLP 64-8-3, batch size" in capsys.readouterr().out
    assert arrays["model"] is None and arrays["hidden"] == [8]
    # float64 becomes float32, so both runs see the same numbers.
    key = "epoch" if command == "observe" else "target_accuracy"
    assert arrays[key] == tensors[key]


def test_own_model_alone(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(command, "--model", "own.models:conv")
    assert "digits: 1,347 training and 450 test samples; own" in capsys.readouterr().out
    assert written["data"] == "digits"


def test_model_is_built_from_the_seed() -> None:
    once, again, other = (run("observe", "--model", "own.models:conv", *seed)["epoch"] for seed in
                          ((), (), ("--seed", "1")))  # fmt: skip
    assert once == again != other


@pytest.mark.parametrize(("data", "model"), [("sentences", "text"), ("images", "vision")])
def test_attention_has_neither_norm_product_nor_rates(
    command: str, data: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = run(command, "--data", f"own.data:{data}", "--model", f"own.models:{model}")
    printed = capsys.readouterr().out
    assert printed.count("are not divided by layer norms (") == 1
    if command == "observe":
        lines = printed.splitlines()
        assert written["left_out"] == lines[1:3]
        assert lines[2].startswith("The margin at scale 1 is left out, because it needs rates (")
        assert "e^-tau" not in printed
        assert written["rates"] is None
        assert [epoch["log_norm"] for epoch in written["epoch"]] == [0, 0]
        assert [epoch["tau_margin"] for epoch in written["epoch"]] == [None, None]
        (row,) = (line for line in lines if line.startswith("      2 "))
        assert len(row) == len(next(line for line in lines if line.startswith("  epoch ")))


def test_embedding_has_rates_but_no_norm_product(capsys: pytest.CaptureFixture[str]) -> None:
    written = run(
        "observe", "--data", "own.data:sentences", "--model", "own.models:Bag", "--regularize"
    )
    printed = capsys.readouterr().out
    assert len(written["left_out"]) == 1 and written["left_out"][0] in printed
    assert "smallest     mean and smallest margin of" in printed
    assert math.isfinite(written["epoch"][1]["tau_margin"])


def test_last_layer_may_come_with_the_network(command: str) -> None:
    run(command, "--data", "own.data:images", "--model", "own.models:with_its_layer")


def test_modules_in_the_current_folder_are_found_by_the_command(folder: Path) -> None:
    script = Path(sys.executable).with_name("marginops")
    starts = [[sys.executable, "-m", "marginops"]]
    starts += [[str(script)]] if script.exists() else []
    for start in starts:
        done = subprocess.run(
            [*start, "observe", "--data", "own.data:images", "--epochs", "1", "--quiet"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("own.data:images: 150 training and 30 test samples; MLP 64-")
