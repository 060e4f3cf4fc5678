"""What the commands refuse of a data set and a network of the user, in one line each."""

from collections.abc import Iterator
from pathlib import Path

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


def assert_refused(
    capsys: pytest.CaptureFixture[str], command: str, options: list[str], message: str
) -> None:
    assert cli.main([command, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"marginops {command}: {message}"), error
    assert error.count("\n") == 1 and len(error) < 500
    assert not list(Path.cwd().glob("*.png"))


PARTS = "train_inputs, train_target, test_inputs, test_target"
X, Y = "np.zeros((4, 2), np.float32)", "(np.arange(4) % 2)"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", f"expected broken:data to return ({PARTS}), got NoneType; return four tensors"),
        (f"{X}, {Y}", f"expected broken:data to return ({PARTS}), got tuple of 2 elements; return"),
        (f"[1, 2], {Y}, {X}, {Y}", "train_inputs: expected a tensor or a NumPy array, got list; "),
        (f"{X}, {Y}, {X}, None", "test_target: expected a tensor or a NumPy array, got NoneType"),
        (f"{X}, {Y}, {X}.astype(object), {Y}", "test_inputs: expected an array of numbers, got ob"),
        (f"{X}, {Y}, {X}.astype(str), {Y}", "test_inputs: expected an array of numbers, got <U"),
        (f"{X}[0], {Y}, {X}, {Y}", "train_inputs: expected shape [N, ...] with at least one sa"),
        (f"{X}[:0], {Y}[:0], {X}, {Y}", "train_inputs: expected shape [N, ...] with at least one"),
        (f"{X}, {Y}, {X}[:0], {Y}[:0]", "test_inputs: expected shape [N, ...] with at least one"),
        (f"{X} + np.nan, {Y}, {X}, {Y}", "train_inputs: expected finite numbers that float32 can"),
        (f"{X}, {Y}, {X} - np.inf, {Y}", "test_inputs: expected finite numbers that float32 can"),
        (f"{X} + 1j, {Y}, {X}, {Y}", "train_inputs: expected real numbers or integers, got torch"),
        (
            f"{X}, {Y}, np.zeros((4, 3)), {Y}",
            "test_inputs: expected torch.float32 of shape [N, 2], as train_inputs, got "
            "torch.float32 of shape [N, 3]",
        ),
        (f"{X}, {Y}[1:], {X}, {Y}", "train_target: expected shape [4], one class for each sample"),
        (f"{X}, {X}, {X}, {Y}", "train_target: expected shape [4], one class for each sample, got"),
        (f"{X}, {Y} / 2, {X}, {Y}", "train_target: expected whole numbers from 0 on, got torch.f"),
        (f"{X}, {Y} - 1, {X}, {Y}", "train_target: expected classes from 0 on, got -1"),
        (f"{X}, {Y} * 0, {X}, {Y}", "train_target: expected two classes or more, got 1"),
        (f"{X}, {Y} * 2, {X}, {Y}", "train_target: expected a sample of every class from 0 to 2, "),
        (f"{X}, {Y}, {X}, {Y} + 1", "test_target: expected classes below 2, the number of classes"),
        (f"torch.zeros(4, 2).to_sparse(), {Y}, {X}, {Y}", "train_inputs: expected a dense tensor"),
        (f"torch.zeros(4, 2, device='meta'), {Y}, {X}, {Y}", "train_inputs: expected a dense tens"),
        (f"{X}.astype(int), {Y}, {X}.astype(int), {Y}", "train_inputs: expected floating-point nu"),
    ],
)
def test_wrong_data(
    command: str, returned: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.py").write_text(
        f"import numpy as np\nimport torch\ndef data():\n    return {returned}\n"
    )
    assert_refused(capsys, command, ["--data", "broken:data"], f"--data: {message}")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("nn.Linear", "expected broken:model to return a torch.nn.Module, or a pair of it and its "
                      "last layer, got type"),
        ("nn.Flatten()", "expected broken:model to return a network with parameters to train, got "
                         "Flatten without any"),
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 11))", "network: expected floating-point logits"
         " of shape [64, 10] for 64 inputs and 10 classes, got torch.float32 of shape [64, 11]; "),
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))", "head: expected logits F."
         "linear(features, weight, bias) of Linear '1', up to a constant in each row, got a diff"),
        ("nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())", "network: no linear layer has 10 "
         "outputs (linear layers: none); return a network whose last layer, a torch.nn.Linear, "),
        ("nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))",
         "network: several linear layers have 10 outputs (1, 3); return a network whose"),
        ("(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Linear(64, 10))", "head: expected "),
        ("(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 'head')", "head: expected a torch.nn.L"),
        ("nn.Linear(8, 10)", "network: expected logits of shape [B, C], got [64, 1, 8, 10]; "),
        ("nn.LSTM(8, 10)", "the network raised "),
        ("nn.Sequential(nn.Flatten(), nn.Linear(63, 10))", "the network raised RuntimeError: mat1"),
        ("undefined", "broken:model raised NameError: name 'undefined' is not defined (broken.py, "
                      "line 4)"),
    ],
)  # fmt: skip
def test_wrong_model(
    command: str, returned: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.py").write_text(
        "import torch\nfrom torch import nn\ndef model(num_classes):\n    return " + returned
    )
    assert_refused(capsys, command, ["--model", "broken:model"], f"--model: {message}")


@pytest.mark.parametrize("option", ["--data", "--model"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere:f", "expected MODULE:FUNCTION with a module that Python finds, got nowhere:f (No "
                      "module named 'nowhere'); run the command in the folder of the module, or"),
        ("own.nowhere:f", "expected MODULE:FUNCTION with a module that Python finds, got own.nowh"),
        ("broken:f", "the import of broken raised ZeroDivisionError: division by zero (broken.py, "
                     "line 2)"),
        ("own.syntax:f", "the import of own.syntax raised SyntaxError: "),
        ("own.leaves:f", "the import of own.leaves raised SystemExit: 3 (leaves.py, line 1)"),
        ("own.imports:f", "the import of own.imports raised ModuleNotFoundError: No module named "
                          "'absent' (imports.py, line 1)"),
        ("own.data:f", "expected MODULE:FUNCTION with a function of the module, got own.data:f (m"),
        ("own.data:torch.pi", "expected a function, got own.data:torch.pi, a float"),
        ("own.strict:f", "expected a function that can be called as f("),
        ("own.strict:g", "own.strict:g raised ValueError (strict.py, line 5)"),
    ],
)  # fmt: skip
def test_function_that_cannot_be_called(
    option: str, place: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.py").write_text("a = 1\na / 0\n")
    (folder / "own/syntax.py").write_text("def f(:\n")
    (folder / "own/leaves.py").write_text("raise SystemExit(3)\n")
    (folder / "own/imports.py").write_text("import absent\n")
    (folder / "own/strict.py").write_text(
        "def f(width):\n    pass\n\ndef g(**_):\n    raise ValueError\n"
    )
    assert_refused(capsys, "observe", [option, place], f"{option}: {message}")


def test_error_of_the_network_in_training(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In evaluation the network works."""
    (folder / "broken.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(64, num_classes)\n"
        "    def forward(self, inputs):\n"
        "        if self.training:\n"
        "            raise ValueError('not now\\nnor later')\n"
        "        return self.head(inputs.flatten(1))\n"
    )
    options = [*SMALL[command], "--model", "broken:Model", "--quiet"]
    message = "--model: the network raised ValueError: not now (broken.py, line 8)\n"
    assert_refused(capsys, command, options, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "own.models:conv", "--hidden", "8"], "--hidden: expected no widths of layers"),
        (["--data", "own.data:images", "--data-dir", "."], "--data-dir: expected no folder for "),
    ],
)
def test_options_that_exclude_each_other(
    command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, command, options, message)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--data", "mnist", "a data set: digits, fashion-mnist or MODULE:FUNCTION"),
        ("--data", "own/data.py:images", "a data set: digits, fashion-mnist or MODULE:FUNCTION"),
        ("--model", "own.models", "a function as MODULE:FUNCTION"),
        ("--model", ":conv", "a function as MODULE:FUNCTION"),
        ("--model", "own.models:conv()", "a function as MODULE:FUNCTION"),
    ],
)
def test_places_of_another_form(
    command: str, option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main([command, option, value])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {option}: expected {expected}, got '{value}'; see" in error


def test_memory_that_ends_in_the_network_is_told_as_such(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.py").write_text(
        "import torch\ndef model(num_classes):\n    torch.empty(2**60)\n"
    )
    assert cli.main([command, "--model", "broken:model"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"marginops {command}: the training needs more memory than there is (")
    assert error.endswith("; lower --batch-size\n")
