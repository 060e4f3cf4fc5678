"""The folder of a run: what it is about, and what each finished task left in it."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .description import differences
from .errors import DataError
from .storage import Storage, is_temporary

if TYPE_CHECKING:
    from .plan import Task

_RUN = "run.json"
_READERS = 16  # threads that read markers; on an object store each takes a while
# The rows of a row group of the scores. So the memory of a writer is bounded, and the bytes of a
# file do not depend on the batches in which the rows came.
_GROUP_ROWS = 131072


class RunFolder:
    """The output of one run, on any file system. Picklable.

    ========================== =================================================================
    ``run.json``               what the run depends on
    ``scores/part-000000.parquet`` the scores of a task
    ``states/NAME/000000.arrow`` what a reduction keeps of a task
    ``done/000000.json``       the marker of a finished task, written after its other files
    ``NAME.parquet``           the result of a reduction
    ``summary.json``           the numbers of the run
    ========================== =================================================================

    No file holds times, machines or paths. So a run that was killed and started again ends with
    the same bytes as one that was not.

    Make one with :meth:`open`.
    """

    def __init__(self, storage: Storage, description: dict[str, Any]) -> None:
        self.storage = storage
        self.description = description

    @classmethod
    def open(cls, location: str | Path, description: dict[str, Any]) -> RunFolder:
        """Begin a run in a new or empty folder, or go on with the same run.

        Args:
            location: A path or URL. It is created.
            description: What the results depend on, as JSON.

        Raises:
            DataError: The folder holds another run or other files. The message says what differs.
            OutputError: The folder cannot be written.
        """
        storage = Storage(location)
        described = json_bytes(description)
        if storage.read(_RUN) is None:
            others = [name for name in storage.sizes() if not is_temporary(name)]
            if others and _RUN not in others:
                raise DataError(
                    f"output: expected a new or empty folder, got {location} with "
                    f"{len(others):,} files, such as {sorted(others)[0]}; choose another folder"
                )
            storage.create(_RUN, described)
        _check_same_run(location, storage.read(_RUN) or b"", described)
        return cls(storage, json.loads(described))

    def finished(self) -> set[int]:
        """The numbers of the tasks whose files are all there.

        A task whose marker, scores or states are missing or have another size is not finished.
        """
        sizes = self.storage.sizes()
        markers = [name for name in sizes if name.startswith("done/") and not is_temporary(name)]
        with ThreadPoolExecutor(_READERS) as threads:
            found = zip(markers, threads.map(self._marker, markers), strict=True)
            return {
                marker["task"]
                for name, marker in found
                if marker is not None
                and name == _marker_name(marker["task"])
                and all(sizes.get(file) == size for file, size in marker["files"].items())
            }

    def counts(self, task: Task) -> dict[str, int]:
        """The numbers of rows by kind of a finished task."""
        marker = self._marker(_marker_name(task.index))
        if marker is None:
            raise self._unreadable(_marker_name(task.index), "no marker")
        return marker["counts"]

    def state(self, task: Task, name: str) -> pa.Table:
        """What the reduction ``name`` kept of a finished task.

        Raises:
            DataError: The file is damaged or missing.
        """
        file_name = _state_name(task.index, name)
        try:
            with self.storage.open_input(file_name) as file:
                return pa.ipc.open_file(pa.BufferReader(file.read())).read_all()
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(file_name, " ".join(str(error).split())) from error

    def states(self, task: Task, names: Iterable[str]) -> dict[str, pa.Table]:
        """What several reductions kept of a finished task."""
        return {name: self.state(task, name) for name in names}

    @contextlib.contextmanager
    def open_task(self, task: Task) -> Iterator[TaskWriter]:
        """A writer of the files of one task, for a ``with`` statement.

        In the block, write all batches of scores (or none), then call ``finish``. The marker is
        written last, when the block ends. If the block raises, the task stays unfinished.

        Raises:
            OutputError: A file cannot be written.
            ValueError: The block did not write all rows, or did not call ``finish``.
        """
        part, written = part_name(task.index), {}
        with contextlib.ExitStack() as files:
            writer = TaskWriter(lambda: files.enter_context(self.storage.open_output(part)))
            yield writer
            if writer.states is None or writer.num_rows not in (0, task.num_rows):
                raise ValueError(
                    f"open_task: expected the scores of {task.num_rows:,} rows and finish(), got "
                    f"{writer.num_rows:,} rows; write all rows of the task"
                )
            writer.close()
        if writer.num_rows:
            written[part] = self.storage.size(part)
        for name, state in writer.states.items():
            state_name = _state_name(task.index, name)
            with (
                self.storage.open_output(state_name) as file,
                pa.ipc.new_file(file, state.schema) as arrow,
            ):
                arrow.write_table(state)
            written[state_name] = self.storage.size(state_name)
        marker = {"task": task.index, "counts": dict(writer.counts), "files": written}
        self.storage.write(_marker_name(task.index), json_bytes(marker))

    def write_task(
        self,
        task: Task,
        scores: pa.Table | Iterable[pa.RecordBatch] | None,
        states: Mapping[str, pa.Table],
        counts: Mapping[str, int],
    ) -> None:
        """Write all files of one task, the marker last.

        Args:
            task: The task.
            scores: Its scores in the order of the rows; None to write none.
            states: What each reduction keeps, by its name.
            counts: The rows by kind.

        Raises:
            OutputError: A file cannot be written. The task is not finished then.
        """
        with self.open_task(task) as writer:
            if isinstance(scores, pa.Table):
                scores = scores.to_batches()
            for batch in scores or ():
                writer.write(batch)
            writer.finish(states, counts)

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the whole run, or replace it.

        Raises:
            OutputError: The file cannot be written.
        """
        self.storage.write(name, content)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file of the whole run, or replace it.

        Raises:
            OutputError: The file cannot be written.
        """
        with self.storage.open_output(name) as file, _parquet_writer(file, table.schema) as writer:
            writer.write_table(table.combine_chunks(), _GROUP_ROWS)

    def _marker(self, name: str) -> dict[str, Any] | None:
        """A marker; None for a file that is none, as a crashed disk may leave it."""
        try:
            marker = json.loads(self.storage.read(name) or b"")
            return marker if {"task", "counts", "files"} <= {*marker} else None
        except (ValueError, TypeError):
            return None

    def _unreadable(self, name: str, reason: str) -> DataError:
        return DataError(
            f"{self.storage.full_name(name)}: expected a file of a finished task, got an error: "
            f"{reason}; delete the file and run the same command again"
        )


class TaskWriter:
    """Takes what belongs to one task: first its scores, batch by batch, then the rest."""

    def __init__(self, open_scores: Callable[[], IO[bytes]]) -> None:
        self.num_rows = 0
        self.states: Mapping[str, pa.Table] | None = None
        self.counts: Mapping[str, int] = {}
        self._open_scores = open_scores
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

    def close(self) -> None:
        """Write the scores that are left, and the footer."""
        if self._num_held:
            self._write_groups(self._num_held)
        if self._parquet is not None:
            self._parquet.close()

    def _write_groups(self, rows: int) -> None:
        held = pa.Table.from_batches(self._held)
        if self._parquet is None:
            self._parquet = _parquet_writer(self._open_scores(), held.schema)
        # Pages end where chunks end.
        self._parquet.write_table(held.slice(0, rows).combine_chunks(), _GROUP_ROWS)
        self._held = held.slice(rows).to_batches()
        self._num_held -= rows


def json_bytes(value: Any) -> bytes:
    """JSON in ASCII, the same bytes for equal values. NaN and infinities become ``null``."""
    return (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode("ascii")


def part_name(task: int) -> str:
    """The name of the scores of a task."""
    return f"scores/part-{task:06}.parquet"


def _state_name(task: int, name: str) -> str:
    return f"states/{name}/{task:06}.arrow"


def _marker_name(task: int) -> str:
    return f"done/{task:06}.json"


def _parquet_writer(file: IO[bytes], schema: pa.Schema) -> pq.ParquetWriter:
    # Few integers besides ids repeat, and floats hardly do, so a dictionary costs time and space.
    repeated = [name for name in schema.names if name in ("target", "prediction", "rival")]
    return pq.ParquetWriter(
        file, schema, compression="zstd", compression_level=1, use_dictionary=repeated
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_same_run(location: str | Path, there: bytes, here: bytes) -> None:
    if there == here:
        return
    try:
        found = differences(json.loads(there), json.loads(here))
    except (ValueError, AttributeError, TypeError, KeyError):
        found = [f"{_RUN} is damaged"]
    raise DataError(
        f"output: expected a new folder or the one of this run, got {location} of another run "
        f"({'; '.join(found)}); choose another folder, or run what began this one"
    )
