"""The files of ``scoring.py``: embeddings, labels and ids in Parquet, and the page cache."""

import concurrent.futures
import ctypes
import functools
import mmap
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor

FEATURES, CLASSES = 128, 100
FILE_ROWS, GROUP_ROWS = 1_048_576, 131_072
CHANGING = 16  # the features that differ between the row groups
BYTES_PER_ROW = 280
COLUMNS = ["id", "label", "embedding"]


def make_files(folder: Path, rows: int, dictionary: bool) -> list[Path]:
    """Write the files that are not there yet, with one process a core. Every run writes the same.

    Args:
        folder: Their folder, which also gets the head, ``head.safetensors``.
        rows: The number of rows of all files.
        dictionary: Encode the embeddings with a dictionary, as pyarrow does by default.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight, bias = head()
    save_file({"weight": weight, "bias": bias}, folder / "head.safetensors")
    starts = range(0, rows, FILE_ROWS)
    paths = [folder / f"rows-{number:05d}.parquet" for number in range(len(starts))]
    jobs = [
        (path, start, min(FILE_ROWS, rows - start), dictionary)
        for path, start in zip(paths, starts, strict=True)
        if not path.exists()
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(cores(), context) as pool:
        for _ in pool.map(_write_file, *zip(*jobs, strict=True)) if jobs else ():
            pass
    return paths


def head() -> tuple[Tensor, Tensor]:
    """Weight ``[C, D]`` and bias of the last layer."""
    random = torch.Generator().manual_seed(7)
    weight = torch.randn(CLASSES, FEATURES, generator=random) / FEATURES**0.5
    return weight, torch.randn(CLASSES, generator=random) / 10


def cores() -> int:
    return len(os.sched_getaffinity(0))


@functools.cache
def _block() -> tuple[np.ndarray, np.ndarray]:
    """The embeddings and predicted classes that all row groups begin with."""
    torch.set_num_threads(1)
    features = np.random.default_rng(0).standard_normal((GROUP_ROWS, FEATURES), np.float32)
    logits = torch.nn.functional.linear(torch.from_numpy(features), *head())
    return features.astype(np.float16), logits.argmax(1).numpy()


def _write_file(path: Path, first_row: int, rows: int, dictionary: bool) -> None:
    values = pa.list_(pa.float16(), FEATURES)
    schema = pa.schema({"id": pa.int64(), "label": pa.int16(), "embedding": values})
    unfinished = path.with_suffix(".unfinished")
    features, classes = _block()
    with (
        unfinished.open("wb") as file,
        pq.ParquetWriter(file, schema, use_dictionary=dictionary) as writer,
    ):
        for start in range(first_row, first_row + rows, GROUP_ROWS):
            count = min(GROUP_ROWS, first_row + rows - start)
            random = np.random.default_rng([1, start])
            own = features[:count].copy()
            own[:, :CHANGING] = random.standard_normal((count, CHANGING), np.float32)
            changed = random.random(count) < 0.1
            label = np.where(changed, random.integers(CLASSES, size=count), classes[:count])
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(own.reshape(-1)), FEATURES)
            columns = [2 * np.arange(start, start + count) + 1, label.astype(np.int16), embedding]
            writer.write_table(pa.table(columns, schema=schema))
    with unfinished.open("rb+") as file:
        os.fsync(file)  # what is not on the disk cannot leave the page cache
    unfinished.rename(path)


def drop_from_cache(paths: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(paths: list[Path]) -> None:
    """Read files once, so that they are in the page cache as far as they fit."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def cached_share(paths: list[Path]) -> float:
    """The share of the files that is in the page cache."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    cached = pages = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as map_:
            flags = np.zeros(-(-len(map_) // mmap.PAGESIZE), np.uint8)
            first = ctypes.c_char.from_buffer(map_)
            if mincore(ctypes.addressof(first), len(map_), flags.ctypes.data):
                raise OSError(ctypes.get_errno(), f"{path}: mincore failed")
            del first  # the map cannot be closed before
            cached, pages = cached + int((flags & 1).sum()), pages + len(flags)
    return cached / pages
