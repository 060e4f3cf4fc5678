"""Options and functions that the score command refuses, each in one line."""

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

from helpers.score_files import ROWS, score
from helpers.user_modules import user_modules
from marginops.commands import console, preparation

MODULE = """
import torch

def text():
    return "head"

def raises():
    raise RuntimeError("no such checkpoint")

class Refuses(torch.nn.Module):
    def forward(self, inputs):
        raise KeyError("token")

def needs(argument):
    pass
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--by", "margin"],
            "--by: expected --select K or --select-per-class K with it, got neither; add one of "
            "them, or leave --by out",
        ),
        (
            ["--largest"],
            "--largest: expected --select K or --select-per-class K with it, got neither; add one "
            "of them, or leave --largest out",
        ),
        (
            ["--select", 5, "--by", "margin"],
            "--by: expected --target with margin, got none; add --target, or choose another "
            "statistic",
        ),
        (
            ["--select", 5, "--by", "rival", "--target", "label"],
            "--by: expected .*margin.*, got 'rival'",
        ),
        (
            ["--statistics", "entropy", "loss"],
            "--statistics: expected --target with loss, got none; add --target, or choose another "
            "statistic",
        ),
        (["--statistics", "noise"], "--statistics: expected names out of margin, .*, got 'noise'"),
        (
            ["--label-issues", 5],
            "--label-issues: expected labels, got no --target; name their column with --target",
        ),
        (
            ["--class-moments"],
            "--class-moments: expected labels, got no --target; name their column with --target",
        ),
        (
            ["--address", "auto"],
            "--address: expected --engine ray with it, got --engine local; add --engine ray, or "
            "leave --address out",
        ),
        (
            ["--layer", "classifier"],
            r"--head: expected a layer 'classifier' named NAME.weight in .*/head.pt, got .*",
        ),
        (["--json", "missing/report.json"], "--json: expected a file in an existing folder, .*"),
        (["--device", "cuda:77"], "--device: expected one of the [0-9]+ CUDA devices .*"),
    ],
)
def test_options(files, refused, options, message):
    refused(files.run(*options), message)
    assert not (files.folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: FILES, --output, --column; see .* --help"),
        (
            ["a.parquet", "--output", "out", "--column", "x"],
            "one of the arguments --head --model --logits is required; see .* --help",
        ),
        (
            ["a.parquet", "--output", "out", "--column", "x", "--logits", "--head", "head.pt"],
            "argument --head: not allowed with argument --logits; see .* --help",
        ),
        (
            ["a.parquet", "--output", "out", "--column", "x", "--logits", "--select", "0"],
            "argument --select: expected a whole number of at least 1, got '0'; see .* --help",
        ),
    ],
)
def test_the_parser(refused, arguments, message):
    with pytest.raises(SystemExit) as ended:
        score(*arguments)
    refused(ended.value.code, message)


def test_a_missing_package(files, refused, monkeypatch):
    found = preparation.find_spec
    monkeypatch.setattr(
        preparation, "find_spec", lambda name: None if name == "fsspec" else found(name)
    )
    refused(
        files.run(), r'missing packages: fsspec; install them with: pip install "marginops\[score]"'
    )


def test_a_missing_package_of_the_engine(files, refused, monkeypatch):
    found = preparation.find_spec
    monkeypatch.setattr(
        preparation, "find_spec", lambda name: None if name == "ray" else found(name)
    )
    message = r'missing packages: ray; install them with: pip install "marginops\[ray]"'
    refused(files.run("--engine", "ray"), message)


@pytest.mark.parametrize(
    ("option", "function", "message"),
    [
        ("--head", "nothing", "--head: expected MODULE:FUNCTION with a function .*nothing.*"),
        ("--head", "text", "--head: expected own.broken:text to return .*, got str"),
        ("--head", "needs", r"--head: expected a function without arguments, got .*\(argument\)"),
        (
            "--head",
            "raises",
            r"--head: own.broken:raises raised RuntimeError: no such checkpoint \(broken.py, line "
            r"8\)",
        ),
        ("--model", "text", "--model: expected own.broken:text to return .*, got str"),
        (
            "--model",
            "Refuses",
            r"--model: own.broken:Refuses raised KeyError: 'token' \(broken.py, line 12\)",
        ),
    ],
)
def test_functions_of_the_user(files, refused, option, function, message):
    with user_modules(files.folder):
        (files.folder / "own/broken.py").write_text(MODULE)
        arguments = (option, f"own.broken:{function}", "--column", "embedding", "--workers", 1)
        refused(score(files.data, *arguments, "--output", files.folder / "out"), message)


def test_an_error_that_is_not_of_the_users_function(files, capsys, monkeypatch):
    """Also where a function of the user is named."""

    def say(text):
        raise console.StandardOutputError("standard output cannot be written: no reader")

    monkeypatch.setattr(console, "say", say)
    with user_modules(files.folder):
        (files.folder / "own/fine.py").write_text(
            "import torch\ndef head():\n    return torch.eye(6), None\n"
        )
        arguments = ("--head", "own.fine:head", "--column", "embedding", "--workers", 1)
        assert score(files.data, *arguments, "--output", files.folder / "out") == 1
    assert capsys.readouterr().err == ("marginops: standard output cannot be written: no reader\n")


def test_no_cluster_of_ray(files, refused, monkeypatch):
    ray_engine = pytest.importorskip("marginops.scoring.ray")

    def run_on_ray(*arguments, address, **options):
        raise ConnectionError(f"address: expected a Ray cluster that runs, got none at {address}")

    monkeypatch.setattr(ray_engine, "run_on_ray", run_on_ray)
    message = "--address: expected a Ray cluster that runs, got none at host:1"
    refused(files.run("--engine", "ray", "--address", "host:1"), message)


def test_more_rows_than_there_are(files, capsys):
    assert files.run("--select", 10 * ROWS) == 0
    line = "selected: all 700 rows that have a minimal_margin, fewer than the 7,000 asked for"
    printed = capsys.readouterr()
    assert line in printed.out.splitlines()
    # Told before the run.
    assert printed.err == "--select 7000 asks for more than the 700 rows; all are selected\n"
