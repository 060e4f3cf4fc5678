"""Rows of tasks: in order, in batches of one length, in little memory; and damaged files."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.scoring_runs import rows_of_logits, write_parquet
from marginops.scoring import DataError
from marginops.scoring.plan import Task
from marginops.scoring.reading import read_task, rebatch, row_group_of

COLUMNS = ["id", "logits"]
ROWS, GROUP_ROWS = 1000, 150


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "rows.parquet", rows_of_logits(ROWS), GROUP_ROWS)


def task_of(path: Path, *groups: int, first_row: int = 0) -> Task:
    metadata = pq.read_metadata(path)
    rows = sum(metadata.row_group(group).num_rows for group in groups)
    return Task(0, str(path), groups, first_row, rows)


def change(path: Path, start: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def test_rows_are_those_of_the_row_groups(file: Path) -> None:
    found = pa.Table.from_batches(read_task(task_of(file, 2, 3, 6), COLUMNS, 64))
    expected = pq.ParquetFile(file).read_row_groups([2, 3, 6], COLUMNS)
    assert found.equals(expected)
    assert found.column_names == COLUMNS


def test_batches_have_at_most_the_given_rows(file: Path) -> None:
    lengths = [len(batch) for batch in read_task(task_of(file, 0, 1), COLUMNS, 64)]
    assert max(lengths) == 64
    assert sum(lengths) == 2 * GROUP_ROWS


def test_a_file_is_closed_at_the_end_and_where_reading_stops(file: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in read_task(task_of(file, 0, 1), COLUMNS, 64):
        pass
    assert set(os.listdir("/proc/self/fd")) == before
    batches = read_task(task_of(file, 0, 1), COLUMNS, 64)
    next(batches)
    batches.close()
    assert set(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 25))
def test_rebatch_keeps_rows_and_gives_equal_lengths(lengths: list[int], rows: int) -> None:
    table = rows_of_logits(sum(lengths), ties=False)
    ends = np.cumsum([0, *lengths])
    batches = [
        batch
        for start, end in pairwise(ends)
        for batch in table.slice(start, end - start).combine_chunks().to_batches()
    ]
    found = list(rebatch(batches, rows))
    assert all(len(batch) == rows for batch in found[:-1])
    assert all(0 < len(batch) <= rows for batch in found)
    assert pa.Table.from_batches(found, table.schema).equals(table)


def test_rebatch_copies_nothing_that_lies_in_one_batch() -> None:
    (batch,) = rows_of_logits(100).combine_chunks().to_batches()
    address = batch["id"].buffers()[1].address
    for index, piece in enumerate(rebatch([batch], 25)):
        assert piece["id"].buffers()[1].address == address
        assert piece["id"].offset == 25 * index


def test_rebatch_reads_no_further_than_it_must() -> None:
    (batch,) = rows_of_logits(10).combine_chunks().to_batches()
    source = iter([batch] * 3)
    next(rebatch(source, 20))
    assert len(list(source)) == 1


def test_row_group_of_a_row(file: Path) -> None:
    task = task_of(file, 2, 3, first_row=5000)
    assert row_group_of(task, 5000) == (2, 5000)
    assert row_group_of(task, 5000 + GROUP_ROWS - 1) == (2, 5000)
    assert row_group_of(task, 5000 + GROUP_ROWS) == (3, 5000 + GROUP_ROWS)


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    rows = 400_000
    path = tmp_path / "one.parquet"
    pq.write_table(rows_of_logits(rows, 16), path, row_group_size=rows, use_dictionary=False)
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_task(task_of(path, 0), ["logits"], 1024):
        most = max(most, pa.total_allocated_bytes() - before)
    # The values have 13 MB, and a page has 1 MiB.
    assert most < 6_000_000


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)], ids=str)
def test_null_rows(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [[1.0, 2.0], None, [3.0, 4.0]]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"logits": pa.array(rows, kind)}), path)
    if pa.types.is_fixed_size_list(kind) and int(pa.__version__.partition(".")[0]) < 26:
        message = (
            f"{path}, row group 0: expected rows that can be read, got an error: Expected all "
            "lists to be of size=2 but index 2 had size=0; write the file anew with list in place "
            "of fixed_size_list where rows are null, or read it with pyarrow 26"
        )
        with pytest.raises(DataError, match=re.escape(message)):
            list(read_task(task_of(path, 0), ["logits"]))
    else:
        (batch,) = read_task(task_of(path, 0), ["logits"])
        assert batch["logits"].to_pylist() == rows


@pytest.mark.parametrize("part", ["page header", "levels", "truncated", "zeros"])
def test_a_damaged_row_group_is_named(file: Path, part: str) -> None:
    task = task_of(file, 1, 2, 3)
    column = pq.read_metadata(file).row_group(2).column(2)
    start, size = column.data_page_offset, column.total_compressed_size
    if part == "page header":
        change(file, start, b"\xff" * 16)
    elif part == "levels":
        # A page is a header of about 30 bytes, then the length of its levels.
        change(file, start + 20, b"\xff" * 40)
    elif part == "zeros":
        change(file, start, b"\0" * size)
    else:
        os.truncate(file, start)
    with pytest.raises(DataError, match=re.escape(str(file))) as raised:
        list(read_task(task, COLUMNS, 64))
    if part != "truncated":
        assert "row group 2: expected rows that can be read, got an error" in str(raised.value)


def test_a_wrong_checksum_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(
        rows_of_logits(ROWS),
        file,
        row_group_size=GROUP_ROWS,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    column = pq.read_metadata(file).row_group(3).column(2)
    change(file, column.data_page_offset + column.total_compressed_size - 2, b"\x12\x34")
    with pytest.raises(DataError, match=r"row group 3: .*CRC"):
        list(read_task(task_of(file, 2, 3), COLUMNS, 64))


def test_a_file_that_is_gone_is_an_error(file: Path) -> None:
    task = task_of(file, 0)
    file.unlink()
    with pytest.raises(DataError, match=f"{re.escape(str(file))}: expected the Parquet file that"):
        list(read_task(task, COLUMNS))


@pytest.mark.parametrize("what", ["rows", "row groups", "size"])
def test_a_file_that_changed_since_the_plan_is_an_error(file: Path, what: str) -> None:
    task, size = task_of(file, 3, 4), file.stat().st_size
    if what == "rows":
        write_parquet(file, rows_of_logits(ROWS), GROUP_ROWS + 1)
        found = "300 rows as at the start of the run, got 302"
    elif what == "row groups":
        write_parquet(file, rows_of_logits(3 * GROUP_ROWS), GROUP_ROWS)
        found = "300 rows as at the start of the run, got 0"
    else:
        size -= 1
        found = f"300 rows in a file of {size:,} bytes as at the start of the run, got 300 in"
    with pytest.raises(DataError, match=rf"row groups 3 to 4: expected {found}"):
        list(read_task(task, COLUMNS, num_bytes=size if what == "size" else None))
