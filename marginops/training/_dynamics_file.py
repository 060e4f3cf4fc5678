"""The state of TrainingDynamics in a file that is mapped into memory."""

from __future__ import annotations

import fcntl
import mmap
import os
from os import PathLike

import numpy as np
import torch

from ..ops.dynamics import COUNTS, VALUES, DynamicsState

_MAGIC = b"marginops state"
_VERSION = 1
_TOTALS = 64
_HEADER = np.dtype(
    {
        "names": ["magic", "version", "num_samples", "decay", "totals"],
        "formats": ["S16", "<i8", "<i8", "<f8", ("<i8", 2)],
        "offsets": [0, 16, 24, 32, _TOTALS],
        "itemsize": 4096,  # one page, so that the arrays behind it begin at a page
    }
)
_SAMPLE_BYTES = 4 * len(VALUES) + 4 * len(COUNTS) + 8


def create(path: str | PathLike[str], num_samples: int, decay: float) -> DynamicsState:
    """Make a file for the state of samples that were never seen.

    The beginning of the header is written last. So a file whose creation was interrupted is no
    state.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError as error:
        raise FileExistsError(
            f"path: expected a new file, got {os.fspath(path)!r}, which exists; open it with "
            "TrainingDynamics.open(path), or delete it"
        ) from error
    try:
        _lock(descriptor, path)
        # Without reserved space a full disk would end the process at some later write.
        os.posix_fallocate(descriptor, 0, _HEADER.itemsize + num_samples * _SAMPLE_BYTES)
        header, state = _map(descriptor, num_samples)
        state.last_seen.fill_(-1)
        header["version"], header["num_samples"], header["decay"] = _VERSION, num_samples, decay
        header["magic"] = _MAGIC
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return state


def open_existing(path: str | PathLike[str]) -> tuple[int, float, DynamicsState]:
    """Open a file that :func:`create` made: the number of samples, the decay and the state."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        _lock(descriptor, path)
        num_samples, decay = _checked_header(descriptor, path)
        return num_samples, decay, _map(descriptor, num_samples)[1]
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str | PathLike[str]) -> None:
    """Keep other processes from the file as long as the map lives, which shares the descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            f"path: expected a file that nobody has open, got {os.fspath(path)!r}, which other "
            "dynamics use; each process needs a file of its own"
        ) from error


def _checked_header(descriptor: int, path: str | PathLike[str]) -> tuple[int, float]:
    """Check that a file is a whole state; returns the number of samples and the decay."""
    content = os.pread(descriptor, _HEADER.itemsize, 0)
    problem = "got another file"
    if len(content) == _HEADER.itemsize:
        header = np.frombuffer(content, _HEADER)[0]
        num_samples, decay = int(header["num_samples"]), float(header["decay"])
        bytes_expected = _HEADER.itemsize + num_samples * _SAMPLE_BYTES
        bytes_there = os.fstat(descriptor).st_size
        if header["magic"] != _MAGIC:
            problem = "got another file, or one whose creation was interrupted"
        elif header["version"] != _VERSION:
            problem = f"got version {header['version']}, and this release reads version {_VERSION}"
        elif num_samples < 1 or not 0 <= decay < 1:
            problem = f"got a damaged header with num_samples={num_samples} and decay={decay}"
        elif bytes_there != bytes_expected:
            problem = f"got {bytes_there} bytes, and {num_samples} samples take {bytes_expected}"
        else:
            return num_samples, decay
    raise ValueError(f"path: expected a file of TrainingDynamics at {os.fspath(path)!r}, {problem}")


def _map(descriptor: int, num_samples: int) -> tuple[np.ndarray, DynamicsState]:
    """Map a file: its header, and its arrays as tensors."""
    content = mmap.mmap(descriptor, 0)
    # Batches touch single samples. Reading ahead of each would read most of the file.
    content.madvise(mmap.MADV_RANDOM)
    start = _HEADER.itemsize

    def take(dtype: torch.dtype, columns: int) -> torch.Tensor:
        nonlocal start
        count = num_samples * columns
        flat = torch.frombuffer(content, dtype=dtype, count=count, offset=start)
        start += count * dtype.itemsize
        return flat.view(num_samples, columns)

    state = DynamicsState(
        take(torch.float32, len(VALUES)),
        take(torch.int32, len(COUNTS)),
        take(torch.int64, 1).squeeze(1),
        torch.frombuffer(content, dtype=torch.int64, count=2, offset=_TOTALS),
    )
    return np.frombuffer(content, _HEADER, 1), state
