"""The Parquet files that a run writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from .outputs import OutputFile

# The rows of a row group. So the memory of a writer is bounded, and the bytes of a file do not
# depend on the batches in which the rows came.
_GROUP_ROWS = 131072
# Integers of few values. Ids and floats hardly repeat, so a dictionary costs them time and space.
_REPEATED = ("target", "prediction", "rival")


class TaskWriter:
    """Takes what belongs to one task: first its scores, batch by batch, then the rest.

    ``RunFolder.open_task`` makes one.
    """

    def __init__(self, open_parquet: Callable[[pa.Schema], pq.ParquetWriter]) -> None:
        self.num_rows = 0
        self.states: Mapping[str, pa.Table] | None = None
        self.counts: Mapping[str, int] = {}
        self._open_parquet = open_parquet
        self._parquet: pq.ParquetWriter | None = None
        self._held: list[pa.RecordBatch] = []
        self._num_held = 0

    def write(self, scores: pa.RecordBatch) -> None:
        """Write the scores of the next rows.

        Raises:
            OutputError: The file cannot be written.
        """
        self.num_rows += len(scores)
        self._num_held += len(scores)
        self._held.append(scores)
        if self._num_held >= _GROUP_ROWS:
            self._write_groups(self._num_held - self._num_held % _GROUP_ROWS)

    def finish(self, states: Mapping[str, pa.Table], counts: Mapping[str, int]) -> None:
        """Say what else belongs to the task. It is written after the scores.

        Args:
            states: What each reduction keeps, by its name.
            counts: The rows by kind.
        """
        self.states, self.counts = states, counts

    def flush(self) -> None:
        """Write the scores that are left."""
        if self._num_held:
            self._write_groups(self._num_held)

    def _write_groups(self, rows: int) -> None:
        held = pa.Table.from_batches(self._held)
        if self._parquet is None:
            self._parquet = self._open_parquet(held.schema)
        # In one piece, or pages would end where batches do.
        self._parquet.write_table(held.slice(0, rows).combine_chunks(), _GROUP_ROWS)
        self._held = held.slice(rows).to_batches()
        self._num_held -= rows


def write_table(file: OutputFile, table: pa.Table) -> None:
    """Write a table as a Parquet file, whose bytes follow from the rows."""
    with parquet_writer(file, table.schema) as writer:
        writer.write_table(table, _GROUP_ROWS)


@contextlib.contextmanager
def parquet_writer(file: OutputFile, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of a Parquet file, which is complete after the block."""
    repeated = [name for name in schema.names if name in _REPEATED]
    writer = pq.ParquetWriter(
        file, schema, compression="zstd", compression_level=1, use_dictionary=repeated
    )
    try:
        yield writer
        writer.close()
    finally:
        # After an error it would write its footer when it is deleted, to a file that is closed.
        writer.is_open = False
