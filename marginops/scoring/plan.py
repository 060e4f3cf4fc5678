"""The tasks of a run: which rows of which file one worker scores at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import _checks as checks
from .errors import DataError
from .footers import Footer, read_footer
from .inputs import InputFile, common_names, find_files
from .storage import shown

if TYPE_CHECKING:
    from .scorer import Scorer

_READERS = 16  # threads that read footers; most of their time is latency
_FOOTERS = 4 * _READERS
_BATCH_BYTES = 4 << 20  # of 2 to 16 MiB the fastest: less memory is touched
_FEWEST_ROWS, _MOST_ROWS = 256, 65536


@dataclass(frozen=True)
class Task:
    """Consecutive row groups of one file.

    Attributes:
        index: The number of the task in the run.
        path: The file: an absolute path or a URL.
        row_groups: The numbers of the row groups in the file; none of them is empty.
        first_row: The number of the first row, counted through all files.
        num_rows: The number of rows.
    """

    index: int
    path: str
    row_groups: tuple[int, ...]
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class DataFile:
    """A Parquet file of a run.

    Attributes:
        path: An absolute path or a URL.
        name: The name relative to the folder that holds all files of the run.
        num_bytes: The size of the file.
        num_rows: The number of rows.
        footer_sha256: The digest of the footer, which holds the schema, the places and the
            statistics of all columns.
    """

    path: str
    name: str
    num_bytes: int
    num_rows: int
    footer_sha256: str


@dataclass(frozen=True)
class Plan:
    """The files of a run and its tasks, which follow from the files and ``task_rows`` alone.

    Attributes:
        files: The files in the given order.
        tasks: The tasks in the order of their rows.
        num_rows: The rows of all files.
        batch_rows: The rows that a worker scores at a time, counted from the first row of a task.
        task_rows: The rows that a task has at least, unless it is the last one of its file.
        schema: The types of the columns that the scorer reads.
    """

    files: tuple[DataFile, ...]
    tasks: tuple[Task, ...]
    num_rows: int
    batch_rows: int
    task_rows: int
    schema: pa.Schema

    def describe(self) -> dict[str, Any]:
        """What the results of a run depend on, as JSON.

        Files have their names relative to the folder that holds them all. So a run goes on after
        this folder has moved, and machines may see it at different places.
        """
        return {
            "rows": self.num_rows,
            "task_rows": self.task_rows,
            "batch_rows": self.batch_rows,
            "files": [
                {
                    "name": file.name,
                    "bytes": file.num_bytes,
                    "rows": file.num_rows,
                    "footer_sha256": file.footer_sha256,
                }
                for file in self.files
            ],
        }


def make_plan(
    files: str | Path | Sequence[str | Path], scorer: Scorer, task_rows: int = 262144
) -> Plan:
    """Read the footers of Parquet files and divide their rows into tasks.

    A task is one row group or several consecutive ones, so that it has at least ``task_rows`` rows.
    The last task of a file may have fewer.

    Args:
        files: Paths, folders (all ``*.parquet`` files directly in them, sorted by name), patterns
            such as ``"data/**/*.parquet"``, and URLs of any of these.
        scorer: What reads the rows. The types of its columns are checked.
        task_rows: The rows of a task.

    Raises:
        DataError: There is no file, a file comes twice, a file is no readable Parquet file, or its
            columns are not those that the scorer reads or not those of the first file.

    Example:
        >>> import tempfile
        >>> import pyarrow as pa
        >>> import pyarrow.parquet
        >>> from marginops.scoring import Scorer
        >>> from marginops.scoring.plan import make_plan
        >>> logits = pa.array([[2.0, 0.5, 1.0]] * 10, pa.list_(pa.float32(), 3))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = pa.table({"logits": logits})
        ...     pa.parquet.write_table(table, f"{folder}/a.parquet", row_group_size=3)
        ...     plan = make_plan(folder, Scorer(column="logits"), task_rows=5)
        >>> [(task.row_groups, task.first_row, task.num_rows) for task in plan.tasks]
        [((0, 1), 0, 6), ((2, 3), 6, 4)]
    """
    checks.check_int("task_rows", task_rows, 1)
    inputs = find_files(files)
    names = common_names(inputs)
    data_files: list[DataFile] = []
    tasks: list[Task] = []
    first_row = column_bytes = 0
    schema: pa.Schema | None = None
    footers = _read_footers(inputs, scorer.column)
    for file, name, footer in zip(inputs, names, footers, strict=True):
        location = file.location
        schema = _checked_schema(location, footer.schema, scorer, schema, inputs[0].location)
        for row_groups, num_rows in _divide(footer.row_groups, task_rows):
            tasks.append(Task(len(tasks), location, row_groups, first_row, num_rows))
            first_row += num_rows
        column_bytes += footer.column_bytes
        rows = sum(footer.row_groups)
        data_files.append(DataFile(location, name, footer.num_bytes, rows, footer.sha256))
    assert schema is not None
    batch_rows = scorer.batch_rows or _rows_of_batch(schema, scorer.column, column_bytes, first_row)
    return Plan(tuple(data_files), tuple(tasks), first_row, batch_rows, task_rows, schema)


def _read_footers(files: Sequence[InputFile], column: str) -> Iterator[Footer]:
    """Read footers in threads, some at a time, because each may have megabytes."""
    with ThreadPoolExecutor(_READERS) as threads:
        for start in range(0, len(files), _FOOTERS):
            part = files[start : start + _FOOTERS]
            yield from threads.map(lambda file: read_footer(file, column), part)


def _checked_schema(
    location: str, found: pa.Schema, scorer: Scorer, first: pa.Schema | None, first_location: str
) -> pa.Schema:
    """The columns of the scorer, which are the same in all files."""
    columns = [name for name in scorer.columns if name in found.names]
    types = [found.field(found.names.index(name)).type for name in columns]
    schema = pa.schema(list(zip(columns, types, strict=True)))
    if schema == first:
        return schema
    try:
        scorer.check_schema(found)
    except DataError as error:
        raise DataError(f"{shown(location)}: {error}") from error
    if first is None:
        return schema
    for column in first:
        kind = schema.field(column.name).type
        if kind != column.type:
            raise DataError(
                f'{shown(location)}: expected column "{column.name}" of type {column.type} as in '
                f"{shown(first_location)}, got {kind}; write all files with the same types"
            )
    return first


def _divide(row_groups: Sequence[int], task_rows: int) -> list[tuple[tuple[int, ...], int]]:
    """Row groups of tasks and their rows. Empty row groups belong to no task."""
    tasks = []
    groups: list[int] = []
    rows = 0
    for group, group_rows in enumerate(row_groups):
        if group_rows == 0:
            continue
        groups.append(group)
        rows += group_rows
        if rows >= task_rows:
            tasks.append((tuple(groups), rows))
            groups, rows = [], 0
    if groups:
        tasks.append((tuple(groups), rows))
    return tasks


def _rows_of_batch(schema: pa.Schema, column: str, column_bytes: int, num_rows: int) -> int:
    """The largest power of two of rows whose values have at most 4 MiB, within limits."""
    row_bytes: float | None = _bytes_of_value(schema.field(column).type)
    if row_bytes is None:
        row_bytes = column_bytes / max(num_rows, 1)
    rows = _MOST_ROWS
    while rows > _FEWEST_ROWS and rows * row_bytes > _BATCH_BYTES:
        rows //= 2
    return rows


def _bytes_of_value(kind: pa.DataType) -> int | None:
    """The bytes of one value of a type; None if values differ."""
    if isinstance(kind, pa.BaseExtensionType):
        return _bytes_of_value(kind.storage_type)
    if pa.types.is_fixed_size_list(kind):
        item = _bytes_of_value(kind.value_type)
        return None if item is None else kind.list_size * item
    try:
        return max(kind.bit_width // 8, 1)
    except ValueError:
        return None
