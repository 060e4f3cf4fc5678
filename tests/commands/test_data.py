"""The data sets: what they hold, and what is said of damaged files."""

import errno
import gzip
import os
import struct
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marginops.commands.data import DataError, load_digits, load_fashion_mnist


def test_digits_are_split_by_class_and_standardised() -> None:
    digits = load_digits()
    assert len(digits.train_target) == 1347
    assert len(digits.test_target) == 450
    shares = digits.test_target.bincount() / (
        digits.test_target.bincount() + digits.train_target.bincount()
    )
    assert (shares - 450 / 1797).abs().max() < 0.01
    deviation, mean = torch.std_mean(digits.train_inputs, dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(1, 8, 8), atol=1e-5, rtol=0)
    assert ((deviation - 1).abs().lt(1e-4) | (deviation == 0)).all()
    assert digits.test_inputs.isfinite().all()
    assert torch.equal(digits.test_inputs, load_digits().test_inputs)


IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def idx_images(count: int = 6, size: int = 28, magic: int = 0x803) -> bytes:
    pixels = bytes(value % 251 for value in range(count * size * size))
    return struct.pack(">4I", magic, count, size, size) + pixels


def idx_labels(count: int = 6, magic: int = 0x801) -> bytes:
    return struct.pack(">2I", magic, count) + bytes(value % 10 for value in range(count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six training and four test samples; one file of each kind compressed."""
    (tmp_path / IMAGES).write_bytes(idx_images())
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx_labels()))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_images(4)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx_labels(4))
    return tmp_path


def test_fashion_mnist_is_read(folder: Path) -> None:
    loaded = load_fashion_mnist(str(folder))
    assert loaded.train_inputs.shape == (6, 1, 28, 28)
    assert loaded.test_inputs.shape == (4, 1, 28, 28)
    assert loaded.train_target.tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded.test_target.tolist() == [0, 1, 2, 3]
    pixels = torch.arange(6 * 784).remainder(251).double()
    expected = (pixels - pixels.mean()) / pixels.std(correction=0)
    torch.testing.assert_close(loaded.train_inputs.flatten().double(), expected)
    torch.testing.assert_close(loaded.test_inputs.flatten().double(), expected[: 4 * 784])
    assert loaded.train_target.dtype == torch.int64


def test_an_uncompressed_file_is_preferred(folder: Path) -> None:
    (folder / f"{IMAGES}.gz").write_bytes(b"not read")
    assert len(load_fashion_mnist(folder).train_target) == 6


def compress(content: bytes) -> bytes:
    """Compressed content that names no time, because names of tests are made of it."""
    return gzip.compress(content, mtime=0)


COMPRESSED = compress(idx_labels())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, r"expected this file or train-images-idx3-ubyte.gz, found none; .*Debian"),
        (IMAGES, idx_images()[:-1], r"expected 4,720 bytes for sizes \[6, 28, 28\], got 4,719"),
        (IMAGES, idx_images() + b"0", r"expected 4,720 bytes .* got 4,721; download it again"),
        (IMAGES, b"\0\0\x08", r"expected a header of 16 bytes, got a file of 3 bytes"),
        (IMAGES, b"", r"expected a header of 16 bytes, got a file of 0 bytes"),
        (IMAGES, idx_images(magic=0x801), r"magic number 0x00000803 .* got 0x00000801"),
        (IMAGES, struct.pack("<4I", 0x803, 6, 28, 28), r"0x00000803 .* got 0x03080000"),
        (IMAGES, idx_images(size=32), r"expected images of 28 x 28 pixels, got 32 x 32"),
        (IMAGES, idx_images(0), r"expected at least one sample, got sizes \[0, 28, 28\]"),
        (LABELS, idx_labels(5), r"expected 6 labels, one for each image in .*, got 5"),
        (LABELS, idx_labels(magic=0x803), r"magic number 0x00000801 .* got 0x00000803"),
        (LABELS, idx_labels()[:-1] + b"\x0a", r"expected labels from 0 to 9, got 10"),
        (f"{LABELS}.gz", COMPRESSED[:-9], r"expected a complete gzip file"),
        (f"{LABELS}.gz", b"<html>not found</html>", r"expected a complete gzip file"),
        (f"{LABELS}.gz", COMPRESSED[:10] + b"\xff" * 20, r"a damaged one"),
        (f"{LABELS}.gz", COMPRESSED[:-8] + b"\xff" * 8, r"a damaged one .CRC check failed"),
        (f"{LABELS}.gz", COMPRESSED + b"garbage", r"a damaged one"),
        (f"{LABELS}.gz", compress(idx_labels() + b"0"), r"14 bytes for sizes \[6\], got more"),
        (f"{LABELS}.gz", compress(idx_labels()[:-1]), r"14 bytes .* got 13; download"),
        (f"{LABELS}.gz", COMPRESSED + compress(b"0"), r"14 bytes .* got more"),
        (f"{LABELS}.gz", compress(idx_labels()) + bytes(2000), r"at most 1,052 compressed "),
        (f"{LABELS}.gz", compress(b""), r"a header of 8 bytes, got a file of 0 bytes"),
        (IMAGES, struct.pack(">4I", 0x803, 2**32 - 1, 28, 28), r"at most 1,000,000 samples, got"),
    ],
)
def test_damaged_files_are_named(
    folder: Path, name: str, content: bytes | None, message: str
) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_fashion_mnist(folder)
    assert str(error.value).startswith(str(folder / name))
    assert "\n" not in str(error.value)


def test_a_file_of_several_gzip_members_is_read(folder: Path) -> None:
    content = idx_labels()
    (folder / f"{LABELS}.gz").write_bytes(compress(content[:5]) + compress(content[5:]))
    assert load_fashion_mnist(folder).train_target.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_is_unpacked_no_further_than_its_header_announces(folder: Path) -> None:
    # 400 MB, from a file that is small enough for the 6 million samples that it could hold.
    packer = zlib.compressobj(9, wbits=31)
    (folder / IMAGES).unlink()
    with open(folder / f"{IMAGES}.gz", "wb") as file:
        file.write(packer.compress(struct.pack(">4I", 0x803, 1000, 28, 28)))
        for _ in range(400):
            file.write(packer.compress(bytes(1 << 20)))
        file.write(packer.flush())
    tracemalloc.start()
    with pytest.raises(DataError, match=r"expected 784,016 bytes for sizes .* got more"):
        load_fashion_mnist(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "got a folder"),
        (pipe, "got a named pipe"),
        (endless, "got a device"),
        (loop, "got: Too many levels of symbolic links"),
    ],
)
def test_only_regular_files_are_read(
    folder: Path, make: Callable[[Path], None], kind: str, suffix: str
) -> None:
    (folder / IMAGES).unlink()
    make(folder / f"{IMAGES}{suffix}")
    with pytest.raises(DataError, match=f"{IMAGES}{suffix}: expected a readable file, {kind}"):
        load_fashion_mnist(folder)


@pytest.mark.parametrize(
    ("name", "reason"), [("a" * 300, "File name too long"), ("a\0b", "null"), ("file", "Not a dir")]
)
def test_folders_that_cannot_be_opened_are_named(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"expected a readable file, got: .*{reason}"):
        load_fashion_mnist(tmp_path / name)


def test_a_folder_without_permission_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Root may open every folder.
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=f"{IMAGES}: expected a readable file, got: Permission"):
        load_fashion_mnist(folder)


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "marginops\[demo\]"'):
        load_digits()
