"""The footer of a Parquet file: what a plan needs to know of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import DataError
from .inputs import InputFile
from .storage import error_line, shown

_TAIL_BYTES = 64 << 10  # most footers fit, so that one read is enough
_MAGIC = b"PAR1"


@dataclass(frozen=True)
class Footer:
    """The footer of one file.

    Attributes:
        num_bytes: The size of the file.
        sha256: The digest of the footer.
        row_groups: The rows of each row group.
        schema: The types of all columns.
        column_bytes: The bytes of the values of one column, decoded, as far as the footer tells.
    """

    num_bytes: int
    sha256: str
    row_groups: tuple[int, ...]
    schema: pa.Schema
    column_bytes: int


def read_footer(file: InputFile, column: str) -> Footer:
    """Read the footer of a file.

    Args:
        file: The file.
        column: The column of which ``column_bytes`` tells.

    Raises:
        DataError: The file cannot be read, or is no complete Parquet file.
    """
    try:
        with file.filesystem.open_input_file(file.path) as opened:
            num_bytes = opened.size()
            footer = _footer_bytes(file.location, opened, num_bytes)
        metadata = pq.read_metadata(pa.BufferReader(_MAGIC + footer))
        schema = metadata.schema.to_arrow_schema()
    except DataError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{shown(file.location)}: expected a Parquet file, got an error: "
            f"{error_line(error, file.location)}; write the file anew, or leave it out"
        ) from error
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    return Footer(
        num_bytes,
        hashlib.sha256(footer).hexdigest(),
        tuple(group.num_rows for group in groups),
        schema,
        _column_bytes(metadata, groups, column),
    )


def _footer_bytes(location: str, file: pa.NativeFile, num_bytes: int) -> bytes:
    """The footer with its length and the last four bytes of the file."""
    tail = _read_end(file, num_bytes, _TAIL_BYTES)
    problem = None
    if num_bytes == 0:
        problem = "an empty file"
    elif tail[-4:] == b"PARE":
        problem = "an encrypted one"
    elif num_bytes < 12 or tail[-4:] != _MAGIC:
        problem = f"{num_bytes:,} bytes that do not end as a Parquet file does"
    if problem is None:
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length + 4 <= num_bytes:
            return tail[-length:] if length <= len(tail) else _read_end(file, num_bytes, length)
        problem = f"a footer of {length:,} bytes in a file of {num_bytes:,}"
    raise DataError(
        f"{shown(location)}: expected a complete Parquet file, got {problem}; write the "
        "file anew, or leave it out"
    )


def _read_end(file: pa.NativeFile, num_bytes: int, length: int) -> bytes:
    file.seek(max(num_bytes - length, 0))
    return file.read()


def _column_bytes(metadata: pq.FileMetaData, groups: list[pq.RowGroupMetaData], column: str) -> int:
    """The bytes of numbers in lists, or of the undecoded pages of anything else."""
    widths = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
    total = 0
    for index in range(metadata.num_columns):
        leaf = metadata.schema.column(index)
        if leaf.path != column and not leaf.path.startswith(f"{column}."):
            continue
        width = widths.get(leaf.physical_type) or max(leaf.length, 0)
        for group in groups:
            chunk = group.column(index)
            total += chunk.num_values * width if width else chunk.total_uncompressed_size
    return total
