"""What the commands that train refuse, in one line each."""

import sys
from pathlib import Path
from shutil import which

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
        (["--data-dir", "nowhere"], "--data-dir: expected no folder for digits, got nowhere; add "),
        (["--output", "nowhere/figure.png"], "the folder nowhere does not exist; create it first"),
        (["--json", "nowhere/report.json"], "the folder nowhere does not exist; create it first"),
        (["--output", "figure.docx"], "--output: expected a name ending in one of "),
        (["--output", "/proc/figure.png"], "--output: expected a place where a file can be "),
        (["--json", "/proc/report.json"], "--json: expected a place where a file can be "),
        (["--output", "figure.pgf"], "--output: matplotlib cannot draw .pgf here: "),
        (["--output", "a.svg", "--json", "./a.svg"], "--json: expected another file than that of"),
        (["--device", "cuda:99"], "--device: expected one of the "),
        (["--hidden", "100000", "1000000"], "--hidden: expected layers whose training fits into"),
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
    if "figure.pgf" in options and which("xelatex"):
        pytest.skip("this machine draws .pgf")
    assert_refused(capsys, command, [*SMALL[command], *options], message)
    assert not list(tmp_path.iterdir())


def test_more_candidates_than_samples(capsys: pytest.CaptureFixture[str]) -> None:
    message = "expected at most 1347, the number of training samples, got 200 times 10; lower"
    assert_refused(capsys, "demo", ["--batch-size", "200"], message)


def test_batches_larger_than_an_epoch_of_stale_margins(capsys: pytest.CaptureFixture[str]) -> None:
    message = "--batch-size: expected at most 539, the number of training samples that an epoch of"
    assert_refused(capsys, "demo", ["--batch-size", "600", "--candidates", "1"], message)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("demo", name) for name in ("sklearn", "matplotlib", "tqdm")),
        *(("observe", name) for name in ("sklearn", "matplotlib", "scipy", "torchmetrics", "tqdm")),
    ],
)
def test_missing_packages_are_named(
    command: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    message = f'missing packages: {name}; install them with: pip install "marginops[demo]"'
    assert_refused(capsys, command, [], message)


def test_memory_that_ends_during_the_training_is_one_line(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_memory(*_: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(torch.optim.SGD, "step", no_memory)
    options = [*SMALL[command], "--output", str(tmp_path / "figure.png")]
    assert cli.main([command, *options]) == 1
    error = capsys.readouterr().err
    message = f"marginops {command}: the training needs more memory than there is ("
    assert error.startswith(message) and error.endswith("lower --hidden or --batch-size\n")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("demo", "--updates", "0"), ("demo", "--seeds", "two"), ("demo", "--batch", "-1")),
        *(("observe", "--epochs", "0"), ("observe", "--seed", "-1")),
        *(("observe", "--seed", text) for text in (str(2**63), str(2**64), "1" * 5000)),
        *((command, "--learning-rate", value) for command in SMALL for value in ("nan", "inf")),
        *(("demo", "--learning-rate", value) for value in ("1e39", "1e-400", "")),
        *(("demo", "--device", value) for value in ("meta", "mps", "xpu", "cpu:7", "abacus", "")),
        *(("demo", "--hidden", value) for value in ("0", str(2**63), "1.5")),
        *(("demo", "--threads", value) for value in ("0", "1000000000000")),
        *(("demo", "--label-noise", value) for value in ("1", "-0.1", "nan", "x", "")),
        *(("demo", option, "") for option in ("--output", "--json", "--data-dir")),
        *(("demo", option, "a\0b") for option in ("--output", "--json", "--data-dir")),
    ],
)
def test_bad_options_are_refused(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, option, value])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"marginops {command}: argument {option}")
    assert ": expected a " in error and ", got '" in error
    assert error.count("\n") == 1 and len(error) < 250


@pytest.mark.parametrize(("broken", "other"), [("--output", "--json"), ("--json", "--output")])
def test_a_result_that_fails_does_not_lose_the_others(
    command: str,
    broken: str,
    other: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept = tmp_path / "kept.png"
    assert cli.main([command, *SMALL[command], broken, "/dev/full", other, str(kept)]) == 1
    printed = capsys.readouterr()
    message = f"marginops {command}: {broken}: /dev/full cannot be written: No space left on device"
    assert printed.err == f"{message}\n"
    assert printed.out.endswith(f"\nwrote {kept}\n")
    assert "test accuracy" in printed.out
    assert kept.stat().st_size > 1000
