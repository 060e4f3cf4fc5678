"""Reads files in idx format, plain or compressed: never more than their header announces."""

from __future__ import annotations

import gzip
import math
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

# More samples than any data set of this kind has. It bounds what a small compressed file, whose
# header announces much, can make of the memory.
_MOST_SAMPLES = 1_000_000
_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


class DataError(ValueError):
    """A data file is missing or damaged. The message names the file and says what to do."""


def read(folder: Path, name: str, shape: Sequence[int], where: str) -> tuple[Path, Tensor]:
    """Read samples of unsigned bytes from ``name``, or else from ``name.gz``.

    The format is a magic number and the sizes (each 32 bit, big endian), then the bytes.

    Args:
        folder: The folder of the file.
        name: The name of the plain file.
        shape: The shape of a sample.
        where: Where the file comes from, for the texts of errors.

    Returns:
        The path of the file, and ``[N, *shape]`` uint8.

    Raises:
        DataError: The file is missing, is no regular file, or its content is not as expected.
    """
    path, file = _open(folder, name, where)
    with file:
        try:
            length = os.fstat(file.fileno()).st_size
            if path.suffix != ".gz":
                return path, _parse(path, file, shape, length, where)
            with gzip.open(file) as unpacked:
                return path, _parse(path, unpacked, shape, length, where)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{path}: expected a complete gzip file, got a damaged one ({error}); "
                "download it again"
            ) from error
        except OSError as error:
            raise _unreadable(path, error) from error


def _open(folder: Path, name: str, where: str) -> tuple[Path, BinaryIO]:
    """Open the plain or the compressed file, if it is a regular one."""
    for path in (folder / name, folder / f"{name}.gz"):
        try:
            # Without this flag a named pipe waits for somebody who writes to it.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            os.close(descriptor)
            kind = next((kind for test, kind in _KINDS.items() if test(mode)), "something else")
            raise DataError(f"{path}: expected a readable file, got {kind}; {where}")
        return path, open(descriptor, "rb")
    raise DataError(f"{folder / name}: expected this file or {name}.gz, found none; {where}")


def _unreadable(path: Path, error: OSError | ValueError) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{path}: expected a readable file, got: {reason}; check its permissions")


def _parse(
    path: Path, file: BinaryIO | gzip.GzipFile, shape: Sequence[int], length: int, where: str
) -> Tensor:
    """Read the samples of an open file that takes ``length`` bytes on the disk."""
    dimensions = 1 + len(shape)
    magic = 0x0800 + dimensions
    header = 4 * (1 + dimensions)
    start = file.read(header)
    if len(start) < header:
        raise DataError(
            f"{path}: expected a header of {header} bytes, got a file of {len(start)} bytes; "
            "download it again"
        )
    found, *sizes = (int.from_bytes(start[at : at + 4], "big") for at in range(0, header, 4))
    if found != magic:
        raise DataError(
            f"{path}: expected magic number 0x{magic:08x} (idx, unsigned bytes, {dimensions} "
            f"dimensions), got 0x{found:08x}; {where}"
        )
    if tuple(sizes[1:]) != tuple(shape):
        raise DataError(
            f"{path}: expected images of {' x '.join(map(str, shape))} pixels, "
            f"got {' x '.join(map(str, sizes[1:]))}; {where}"
        )
    if not 1 <= sizes[0] <= _MOST_SAMPLES:
        limit = f"at most {_MOST_SAMPLES:,} samples" if sizes[0] else "at least one sample"
        raise DataError(f"{path}: expected {limit}, got sizes {sizes}; {where}")
    expected = header + math.prod(sizes)
    packed = isinstance(file, gzip.GzipFile)
    # Even what cannot be compressed grows by less. Python skips zeros at the end byte by byte.
    if packed and length > 2 * expected + 1024:
        raise DataError(
            f"{path}: expected at most {2 * expected + 1024:,} compressed bytes for sizes {sizes}, "
            f"got {length:,}; download it again"
        )
    if packed or length == expected:
        content = bytearray(file.read(expected - header))
        length = header + len(content) + len(file.read(1))
        if length == expected:
            return torch.frombuffer(content, dtype=torch.uint8).view(sizes)
    amount = "more" if packed and length > expected else f"{length:,}"
    raise DataError(
        f"{path}: expected {expected:,} bytes for sizes {sizes}, got {amount}; download it again"
    )
