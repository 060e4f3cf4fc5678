"""What the commands that train refuse, in one line each."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")

import marginops
from marginops.commands import cli

SMALL = {
    "demo": ["--updates", "30", "--quiet"],
    "observe": ["--epochs", "3", "--batch-size", "64", "--quiet"],
}
DIVERGED = {"demo": "diverged (uniform, seed 1); lower", "observe": "diverged in epoch 1; lower"}


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now: what it says then is not the command's."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.fixture(params=SMALL)
def command(request: pytest.FixtureRequest) -> str:
    return request.param


def assert_refused(
    capsys: pytest.CaptureFixture[str], command: str, options: list[str], message: str
) -> None:
    assert cli.main([command, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"marginops {command}: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "fashion-mnist", "--data-dir", "nowhere"], "nowhere/train-images-idx3-ubyte: "),
        (["--output", "nowhere/figure.png"], "the folder nowhere does not exist; create it first"),
        (["--json", "nowhere/report.json"], "the folder nowhere does not exist; create it first"),
        (["--output", "figure.docx"], "--output figure.docx: expected a name ending in one of "),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch finds "),
        (["--learning-rate", "1e9"], "training diverged"),
    ],
)
def test_errors_are_one_line_and_exit_with_two(
    command: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if message == "training diverged":
        message = DIVERGED[command]
    assert_refused(capsys, command, [*SMALL[command], *options], message)
    assert not list(tmp_path.iterdir())


def test_more_candidates_than_samples(capsys: pytest.CaptureFixture[str]) -> None:
    message = "200 times --candidates 10 is 2000, more than the 1347 training"
    assert_refused(capsys, "demo", ["--batch-size", "200"], message)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("demo", name) for name in ("sklearn", "matplotlib", "tqdm")),
        *(("observe", name) for name in ("sklearn", "matplotlib", "scipy", "torchmetrics")),
    ],
)
def test_missing_packages_are_named(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    message = f'missing packages: {name}; install them with: pip install "marginops[demo]"'
    assert_refused(capsys, command, [], message)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("demo", "--updates", "0"), ("demo", "--seeds", "two")),
        *(("observe", "--epochs", "0"), ("observe", "--seed", "-1")),
        ("observe", "--seed", str(2**63)),
        *((command, "--learning-rate", value) for command in SMALL for value in ("nan", "inf")),
        *((command, "--device", "abacus") for command in SMALL),
    ],
)
def test_bad_options_are_refused(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, option, value])
    assert exit_info.value.code == 2
    assert f"argument {option}: expected a " in capsys.readouterr().err
