"""Where the commands find Fashion-MNIST if no folder is given."""

import gzip
import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")

import marginops
from helpers import file_server
from helpers.file_server import Server
from marginops.commands import cli, fashion_mnist
from marginops.commands.download import RemoteFile, Source


@pytest.fixture(scope="module", autouse=True)
def native_library() -> None:
    """Build or load the native library now, from a cache that the tests do not see."""
    marginops.select_smallest(torch.zeros(2), 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with 60 training and 20 test samples, and no Debian package."""
    content = {}
    for split, count in (("train", 60), ("t10k", 20)):
        images = struct.pack(">4I", 0x803, count, 28, 28) + bytes(
            value * value % 251 for value in range(count * 784)
        )
        labels = struct.pack(">2I", 0x801, count) + bytes(value % 10 for value in range(count))
        content[f"{split}-images-idx3-ubyte.gz"] = gzip.compress(images)
        content[f"{split}-labels-idx1-ubyte.gz"] = gzip.compress(labels)
    files = [
        RemoteFile(
            file.name,
            len(content[file.name]),
            hashlib.sha256(content[file.name]).hexdigest(),
        )
        for file in fashion_mnist.SOURCE.files
    ]
    otherwise = fashion_mnist.SOURCE.otherwise
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", cache.parent / "package")
    with file_server.serve(content) as server:
        new = Source("fashion-mnist", server.address, files, otherwise)
        monkeypatch.setattr(fashion_mnist, "SOURCE", new)
        yield server


COMMANDS = {
    "demo": ["--updates", "12", "--batch-size", "4", "--seeds", "1", "--candidates", "4"],
    "observe": ["--epochs", "2", "--batch-size", "30"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_download_fashion_mnist(
    command: str,
    server: Server,
    cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--data", "fashion-mnist", "--hidden", "8", "--quiet", *COMMANDS[command]]
    options += ["--output", str(tmp_path / "figure.svg")]
    assert cli.main([command, *options]) == 0
    printed = capsys.readouterr()
    assert "fashion-mnist: 60 training and 20 test samples" in printed.out
    assert printed.err == ""
    assert len(server.asked) == 4

    for path in (cache / "data/fashion-mnist").glob("*.gz"):
        path.unlink()
    server.answers["train-images-idx3-ubyte.gz"] = file_server.missing
    assert cli.main([command, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"marginops {command}: {server.address}train-images-")
    assert "install the Debian package dataset-fashion-mnist" in error
    assert error.endswith("--data-dir\n") and error.count("\n") == 1


def test_files_of_the_package_come_first(server: Server, cache: Path) -> None:
    package = fashion_mnist.PACKAGE_FOLDER
    package.mkdir()
    names = [file.name for file in fashion_mnist.SOURCE.files]
    for name in names[1:]:
        (package / name).touch()
    assert fashion_mnist.find_folder(quiet=True) == cache / "data/fashion-mnist"
    (package / names[0].removesuffix(".gz")).touch()
    assert fashion_mnist.find_folder(quiet=True) == package


def test_the_checksums_are_those_of_the_authors() -> None:
    """The files of the Debian package are the original ones, but for the header of gzip."""
    folder = fashion_mnist.PACKAGE_FOLDER
    if not folder.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    # The authors' gzip noted when the files were made, and their names.
    made = {"train": 1504176606, "t10k": 1504176627}
    assert len(fashion_mnist.SOURCE.files) == 4
    for file in fashion_mnist.SOURCE.files:
        packed = (folder / file.name).read_bytes()
        assert packed[3] == 0, "this header has a name"
        header = b"\x1f\x8b\x08\x08" + struct.pack("<I", made[file.name.partition("-")[0]])
        name = file.name.removesuffix(".gz").encode()
        original = header + b"\0\x03" + name + b"\0" + packed[10:]
        assert len(original) == file.size
        assert hashlib.sha256(original).hexdigest() == file.sha256
