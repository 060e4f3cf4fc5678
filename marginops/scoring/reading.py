"""The rows of a task: streamed out of its row groups, cut into batches of a fixed length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError

if TYPE_CHECKING:
    from .plan import Task

# Columns of a row group are read through buffers of this size. Without it pyarrow loads whole column
# chunks, which may be larger than the memory.
_BUFFER_BYTES = 1 << 20


def read_task(
    task: Task, columns: Sequence[str], batch_rows: int = 65536
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a task in batches of at most ``batch_rows`` rows.

    A row group is never in memory as a whole: the peak is a few batches and a page of each column.

    Args:
        task: The row groups of a file.
        columns: The columns to read.
        batch_rows: The longest batch.

    Raises:
        DataError: The file cannot be read, or is not the one that the plan saw. The message names
            the file and the row group.
    """
    with _open(task) as file:
        _check_rows(task, file)
        for group in task.row_groups:
            yield from _read_group(task.path, file, group, columns, batch_rows)


def _open(task: Task) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(
            task.path,
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
            page_checksum_verification=True,
        )
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{task.path}: expected the Parquet file of the plan, got an error: {_line(error)}; "
            "write the file anew, or leave it out and take another output folder"
        ) from error


def _check_rows(task: Task, file: pq.ParquetFile) -> None:
    metadata = file.metadata
    groups = metadata.num_row_groups
    rows = sum(metadata.row_group(group).num_rows for group in task.row_groups if group < groups)
    if rows != task.num_rows:
        raise DataError(
            f"{task.path}: expected {task.num_rows:,} rows in {_groups(task)} as at the start of "
            f"the run, got {rows:,}; do not change files during a run"
        )


def _read_group(
    path: str, file: pq.ParquetFile, group: int, columns: Sequence[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    expected, rows = file.metadata.row_group(group).num_rows, 0
    try:
        for batch in file.iter_batches(batch_rows, [group], columns, use_threads=False):
            rows += len(batch)
            yield batch
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}, row group {group}: expected {expected:,} rows, got an error after row "
            f"{rows:,}: {_line(error)}; write the file anew"
        ) from error
    if rows != expected:
        raise DataError(
            f"{path}, row group {group}: expected {expected:,} rows, got {rows:,}; "
            "write the file anew"
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


def row_group_of(task: Task, row: int) -> int:
    """The row group in which row ``row`` of all files lies. It opens the file."""
    first_row = task.first_row
    with _open(task) as file:
        for group in task.row_groups:
            first_row += file.metadata.row_group(group).num_rows
            if row < first_row:
                break
    return group


def _join(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    (joined,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return joined


def _groups(task: Task) -> str:
    first, last = task.row_groups[0], task.row_groups[-1]
    return f"row group {first}" if first == last else f"row groups {first} to {last}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
