"""The rows of a task: streamed out of its row groups, cut into batches of a fixed length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError
from .storage import error_line, open_input, shown

if TYPE_CHECKING:
    from .plan import Task

# Columns are read through buffers of this size. Otherwise pyarrow loads the whole column of a row
# group, which may be larger than the memory. It does so all the same where pages have less than
# 16 KiB: it looks that far ahead for the header of the next page, and its buffer only grows.
_BUFFER_BYTES = 1 << 20


def read_task(
    task: Task,
    columns: Sequence[str],
    batch_rows: int = 65536,
    num_bytes: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a task in batches of at most ``batch_rows`` rows.

    The memory holds a batch and a page of each column, or a column of a row group whose pages have
    less than 16 KiB.

    Args:
        task: Row groups of a file.
        columns: The columns to read.
        batch_rows: The rows of the longest batch.
        num_bytes: The size that the file must have; None for any.

    Raises:
        DataError: The file cannot be read, or it is not the one that the plan saw. The message
            names the file and the row group.
    """
    with _open(task, num_bytes) as file:
        groups, rows = list(task.row_groups), 0
        try:
            # One call for all row groups takes a tenth less time than one call for each.
            for batch in file.iter_batches(batch_rows, groups, columns, use_threads=False):
                rows += len(batch)
                yield batch
        except (OSError, pa.ArrowException) as error:
            raise _located(error, task, file, columns, batch_rows) from error
        if rows != task.num_rows:
            raise DataError(
                f"{task_place(task)}: expected {task.num_rows:,} rows, got {rows:,}; write the "
                "file anew"
            )


@contextmanager
def _open(task: Task, num_bytes: int | None = None) -> Iterator[pq.ParquetFile]:
    try:
        source = open_input(task.path)
        size = source.size()
        file = pq.ParquetFile(
            source, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{shown(task.path)}: expected the Parquet file that was there at the start of the "
            f"run, got an error: {error_line(error, task.path)}; put it back, and run again"
        ) from error
    with source, file:
        _check_unchanged(task, file.metadata, size, num_bytes)
        yield file


def _check_unchanged(
    task: Task, metadata: pq.FileMetaData, size: int, num_bytes: int | None
) -> None:
    groups = [group for group in task.row_groups if group < metadata.num_row_groups]
    rows = sum(metadata.row_group(group).num_rows for group in groups)
    expected, found = f"{task.num_rows:,} rows", f"{rows:,}"
    if num_bytes is not None:
        expected, found = f"{expected} in a file of {num_bytes:,} bytes", f"{found} in {size:,}"
    if rows != task.num_rows or num_bytes not in (None, size):
        raise DataError(
            f"{task_place(task)}: expected {expected} as at the start of the "
            f"run, got {found}; leave files unchanged during a run, and run again in a new folder"
        )


def _located(
    error: Exception, task: Task, file: pq.ParquetFile, columns: Sequence[str], batch_rows: int
) -> DataError:
    """The error with its row group, which is read again to find it."""
    place = task_place(task)
    for group in task.row_groups:
        try:
            for _ in file.iter_batches(batch_rows, [group], columns, use_threads=False):
                pass
        except (OSError, pa.ArrowException) as again:
            place, error = f"{shown(task.path)}, row group {group}", again
            break
    # Before version 26, pyarrow writes fixed_size_list with null rows and cannot read it.
    is_null = "Expected all lists to be of size" in str(error)
    how = (
        " with list in place of fixed_size_list where rows are null, or read it with pyarrow 26"
        if is_null
        else ""
    )
    return DataError(
        f"{place}: expected rows that can be read, got an error: "
        f"{error_line(error, task.path)}; write the file anew{how}"
    )


def rebatch(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the same rows in batches of exactly ``rows`` rows; the last may be shorter.

    A batch that lies within an incoming one is a slice of it. Others are copied together.
    """
    held: list[pa.RecordBatch] = []
    held_rows = 0
    for batch in batches:
        start = 0
        while start < len(batch):
            piece = batch.slice(start, rows - held_rows)
            start += len(piece)
            held_rows += len(piece)
            held.append(piece)
            if held_rows == rows:
                yield _join(held)
                held, held_rows = [], 0
    if held:
        yield _join(held)


def row_group_of(task: Task, row: int) -> tuple[int, int]:
    """The row group of row ``row`` of all files, and its first row. It opens the file."""
    with _open(task) as file:
        first_row = task.first_row
        for group in task.row_groups:
            end = first_row + file.metadata.row_group(group).num_rows
            if row < end:
                break
            first_row = end
    return group, first_row


def _join(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    (joined,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return joined


def task_place(task: Task) -> str:
    """The file and the row groups of a task, for an error."""
    first, last = task.row_groups[0], task.row_groups[-1]
    groups = f"row group {first}" if first == last else f"row groups {first} to {last}"
    return f"{shown(task.path)}, {groups}"
