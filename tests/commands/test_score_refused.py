"""What the score command refuses, each in one line: options, files, heads and folders."""

import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

import pyarrow as pa
import pyarrow.parquet as pq
import torch

import marginops
from helpers.score_files import ROWS, WIDTH, Embeddings, score
from helpers.user_modules import user_modules
from marginops.commands import console, figures, preparation

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


@pytest.fixture(scope="module", autouse=True)
def native_library():
    """Build or load the native library now: what it says then is not the command's."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.fixture
def files(tmp_path):
    return Embeddings(tmp_path)


@pytest.fixture
def refused(capsys):
    """Check the exit status and the one line, a regular expression."""

    def check(status, message, expected=2):
        printed = capsys.readouterr()
        assert status == expected, printed.err
        assert printed.err.count("\n") == 1, printed.err
        assert re.fullmatch(rf"marginops score: {message}\n", printed.err), printed.err
        assert printed.out == ""

    return check


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


@pytest.mark.parametrize("option", ["--column", "--target", "--id"])
def test_a_missing_column(files, refused, option):
    message = "[a-z]+: expected one column 'nothing', got columns id, label, embedding"
    refused(files.run(option, "nothing"), f".*/data/a.parquet: {message}")
    assert not (files.folder / "out").exists()


def test_columns_of_other_types(files, refused):
    refused(files.run("--column", "id"), ".*/data/a.parquet: column: expected .*, got int64")
    refused(
        files.run("--target", "embedding"), ".*/data/a.parquet: target: expected .*, got fixed.*"
    )


def test_a_column_of_bytes_without_a_dtype(files, refused):
    size = 2 * WIDTH
    files.write(embedding=pa.array([row.tobytes() for row in files.values], pa.binary(size)))
    message = ".*/data/a.parquet: dtype: expected float16, .* for 'embedding' of type fixed.*"
    refused(files.run(), message)
    refused(
        files.run("--dtype", "float64"), ".*/data/a.parquet: column: expected rows of float64.*"
    )


def test_a_head_of_another_width(files, refused):
    torch.save({"weight": torch.zeros(4, WIDTH + 1)}, files.folder / "head.pt")
    message = (
        f".*/data/a.parquet: column: expected rows of {WIDTH + 1} values in 'embedding', the width "
        f"of the head .*/head.pt, got {WIDTH}"
    )
    refused(files.run(), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--head: expected a file that can be read, got .*/head.pt .*No such file.*"),
        (b"", "--head: expected a whole file of safetensors or torch.save, got .*/head.pt .*"),
        (b"weights", "--head: expected .*, got .*/head.pt .*"),
    ],
)
def test_a_head_that_cannot_be_read(files, refused, content, message):
    (files.folder / "head.pt").unlink()
    if content is not None:
        (files.folder / "head.pt").write_bytes(content)
    refused(files.run(), message)


def test_a_file_with_several_layers(files, refused):
    state = {"first.weight": torch.ones(WIDTH, WIDTH), "last.weight": torch.ones(4, WIDTH)}
    torch.save(state, files.folder / "head.pt")
    message = (
        r"--head: expected one layer with a matrix named NAME.weight in .*/head.pt, got 'first' "
        r"\[6, 6\], 'last' \[4, 6\]; pass --layer, the name of one"
    )
    refused(files.run(), message)
    assert files.run("--layer", "last") == 0


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

    def run_on_ray(*arguments, address):
        raise ConnectionError(f"address: expected a Ray cluster that runs, got none at {address}")

    monkeypatch.setattr(ray_engine, "run_on_ray", run_on_ray)
    message = "--address: expected a Ray cluster that runs, got none at host:1"
    refused(files.run("--engine", "ray", "--address", "host:1"), message)


def test_rows_of_several_lengths(files, refused):
    rows = files.values.tolist()
    rows[433] = rows[433][:-1]
    files.write(embedding=pa.array(rows, pa.list_(pa.float16())))
    message = (
        ".*/data/b.parquet, row group 0: column: expected rows of 6 values in 'embedding', got 5 "
        "in row 83 of the row group"
    )
    refused(files.run(), message)
    assert len(list((files.folder / "out/done").iterdir())) == 4  # the tasks before


def test_a_label_out_of_range(files, refused):
    files.label[655] = 4
    files.write()
    message = r".*/data/b.parquet, row group 3: target: expected .*4.*"
    refused(files.run("--target", "label"), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,label\n1,2\n", "13 bytes that do not end as a Parquet file does"),
        (b"", "an empty file"),
        ("half", "[0-9,]+ bytes that do not end as a Parquet file does"),
    ],
)
def test_a_file_that_is_no_parquet_file(files, refused, content, message):
    path = files.data / "b.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    message = (
        f".*/data/b.parquet: expected a complete Parquet file, got {message}; write the file anew, "
        "or leave it out"
    )
    refused(files.run(), message)
    assert not (files.folder / "out").exists()


def test_a_corrupt_page(files, refused):
    path = files.data / "b.parquet"
    part = pq.ParquetFile(path).metadata.row_group(2).column(2)
    start = part.data_page_offset
    whole = bytearray(path.read_bytes())
    whole[start : start + part.total_compressed_size] = b"\xff" * part.total_compressed_size
    path.write_bytes(whole)
    refused(
        files.run(), r".*/data/b.parquet, row group 2: expected rows that can be read, got an .*"
    )
    assert len(list((files.folder / "out/done").iterdir())) == 6  # the tasks before


def test_no_such_file(refused, files):
    status = score(
        files.folder / "nowhere", "--logits", "--column", "x", "--output", files.folder / "out"
    )
    message = "expected a file, a folder or a pattern, got nothing there; check the path"
    refused(status, f".*/nowhere: {message}")


def test_the_folder_of_another_run(files, refused, capsys):
    assert files.run("--select", 5) == 0
    capsys.readouterr()
    before = (files.folder / "out/selection.parquet").read_bytes()
    refused(
        files.run("--select", 6), r"--output: expected .* another run .*k: 5 there and 6 here.*"
    )
    torch.save({"weight": torch.ones(4, WIDTH)}, files.folder / "head.pt")
    refused(files.run("--select", 5), "--output: expected .* another run .*head sha256.*")
    assert (files.folder / "out/selection.parquet").read_bytes() == before


def test_a_folder_with_other_files(files, refused):
    (files.folder / "out").mkdir()
    (files.folder / "out/notes.txt").write_text("mine")
    message = (
        "--output: expected a new or empty folder, got .*/out with 1 files?, such as notes.txt; "
        "choose another folder"
    )
    refused(files.run(), message)
    assert os.listdir(files.folder / "out") == ["notes.txt"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(files, refused, disk, capsys):
    (disk / "other").write_bytes(bytes(236 << 10))
    message = (
        "--output: expected a folder that can be read and written, got a full disk for "
        ".*/disk/out/.*; finished tasks stay, so free space and run the same command again"
    )
    refused(files.run(output="disk/out"), message, expected=1)
    finished = len(list((disk / "out/done").glob("0*")))
    assert 0 < finished < 8
    (disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=3m", str(disk)], check=True)
    assert files.run(output="disk/out") == 0
    error = capsys.readouterr().err
    resumed = re.fullmatch(r"resumed: (\d+) of 700 rows are scored already\n", error)
    assert resumed and int(resumed[1]) > 0
    assert files.run() == 0
    for name in ("summary.json", "margins.parquet", "scores/part-000007.parquet"):
        assert (disk / "out" / name).read_bytes() == (files.folder / "out" / name).read_bytes()


def test_an_output_that_is_a_file(files, refused):
    (files.folder / "out").write_text("mine")
    message = "--output: expected a folder, got the file .*/out; choose another name"
    refused(files.run(), message)
    assert (files.folder / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(files, refused):
    files.folder.joinpath("locked").mkdir(mode=0o500)
    message = "--output: expected a folder that can be read and written, got no permission for .*"
    refused(files.run(output="locked/out"), message, expected=1)


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(files, capsys, monkeypatch):
    def render(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr(figures, "render", render)
    assert files.run("--json", files.folder / "report.json") == 1
    printed = capsys.readouterr()
    output = files.folder / "out"
    assert printed.err == (
        f"marginops score: {output}/figure.png cannot be written: RuntimeError: no font\n"
    )
    assert f"wrote {files.folder}/report.json" in printed.out.splitlines()
    assert "figure.png" not in printed.out and (files.folder / "report.json").exists()


def test_more_rows_than_there_are(files, capsys):
    assert files.run("--select", 10 * ROWS) == 0
    line = "selected: all 700 rows that have a minimal_margin, fewer than the 7,000 asked for"
    printed = capsys.readouterr()
    assert line in printed.out.splitlines()
    # Told before the run.
    assert printed.err == "--select 7000 asks for more than the 700 rows; all are selected\n"
