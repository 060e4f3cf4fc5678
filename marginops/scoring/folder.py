"""The folder of a run: what it is about, and what each finished task left in it."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .._json import json_bytes
from .description import differences
from .errors import DataError
from .outputs import is_temporary
from .parts import TaskWriter, parquet_writer, write_table
from .storage import Storage

if TYPE_CHECKING:
    from .plan import Task

_RUN = "run.json"
# Threads for small files; on an object store each takes a while.
_THREADS = 16
_AHEAD_BYTES = 64 << 20


class RunFolder:
    """The output of one run, on any file system. Picklable. Make one with :meth:`open`.

    ============================== =============================================================
    ``run.json``                   what the run depends on
    ``scores/part-000000.parquet`` the scores of a task
    ``states/NAME/000000.arrow``   what a reduction keeps of a task
    ``done/000000.json``           the marker of a finished task, written after its other files
    ``NAME.parquet``               the result of a reduction
    ``summary.json``               the numbers of the run
    ============================== =============================================================

    No file holds times, machines or paths. So a run that was killed and started again ends with
    the same bytes as one that was not.

    Attributes:
        storage: The files.
        description: The content of ``run.json``.
    """

    def __init__(self, storage: Storage, description: dict[str, Any]) -> None:
        self.storage = storage
        self.description = description

    @classmethod
    def open(cls, location: str | Path, description: dict[str, Any]) -> RunFolder:
        """Begin a run in a new or empty folder, or go on with the same run.

        Args:
            location: A path or URL. The folder is created.
            description: What the results depend on, from ``describe_run``.

        Raises:
            DataError: The folder holds another run or other files. The message says what differs.
            OutputError: The folder cannot be written.
        """
        storage = Storage(location)
        if storage.is_file():
            raise DataError(
                f"output: expected a folder, got the file {storage.full_name()}; "
                "choose another name"
            )
        described = json_bytes(description)
        if _parse(storage.read(_RUN)) is None:
            _begin(storage, described)
        here, there = json.loads(described), _parse(storage.read(_RUN))
        found = differences(there, here) if there is not None else [f"{_RUN} is damaged"]
        if found:
            raise DataError(
                "output: expected a new folder or the one of this run, got "
                f"{storage.full_name()} of another run ({'; '.join(found)}); choose another "
                "folder, or delete this one if you do not need it"
            )
        return cls(storage, here)

    def finished(self) -> set[int]:
        """The numbers of the tasks whose files are all there.

        A task whose marker, scores or states are missing or have another size is not finished.
        """
        return set(self.markers())

    def markers(self) -> dict[int, dict[str, Any]]:
        """The marker of each finished task, by its number.

        A marker holds ``"task"``, the number; ``"counts"``, the rows by kind; and ``"files"``, the
        sizes of the other files by their names.
        """
        sizes = self.storage.sizes()
        names = [name for name in sizes if name.startswith("done/") and not is_temporary(name)]
        with ThreadPoolExecutor(_THREADS) as threads:
            markers = [_parse(content) for content in threads.map(self.storage.read, names)]
        return {
            marker["task"]: marker
            for name, marker in zip(names, markers, strict=True)
            # A crashed disk may have left anything.
            if marker is not None
            and {*marker} == {"task", "counts", "files"}
            and name == _marker_name(marker["task"])
            and all(sizes.get(file) == size for file, size in marker["files"].items())
        }

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
            raise DataError(
                f"{self.storage.full_name(file_name)}: expected the file of a finished task, got "
                f"an error: {' '.join(str(error).split())}; delete the file and run the same "
                "command again"
            ) from error

    def states(self, tasks: Iterable[Task], name: str) -> Iterator[pa.Table]:
        """What the reduction ``name`` kept of each finished task, read ahead within 64 MiB.

        Raises:
            DataError: A file is damaged or missing.
        """
        sizes = self.storage.sizes(f"states/{name}")
        with ThreadPoolExecutor(_THREADS) as threads:
            ahead: deque[tuple[int, Future[pa.Table]]] = deque()
            for task in tasks:
                size = sizes.get(_state_name(task.index, name), 0)
                while ahead and (
                    len(ahead) == _THREADS or sum(part for part, _ in ahead) + size > _AHEAD_BYTES
                ):
                    yield ahead.popleft()[1].result()
                ahead.append((size, threads.submit(self.state, task, name)))
            while ahead:
                yield ahead.popleft()[1].result()

    @contextlib.contextmanager
    def open_task(self, task: Task) -> Iterator[TaskWriter]:
        """A writer of the files of one task, for a ``with`` statement.

        In the block, write all batches of scores (or none), then call ``finish``. The marker is
        written last, when the block ends. If the block raises, the task stays unfinished.

        Raises:
            OutputError: A file cannot be written.
            ValueError: The block did not write all rows, or did not call ``finish``.
        """
        part = part_name(task.index)
        with contextlib.ExitStack() as files:

            def open_parquet(schema: pa.Schema) -> pq.ParquetWriter:
                file = files.enter_context(self.storage.open_output(part))
                return files.enter_context(parquet_writer(file, schema))

            writer = TaskWriter(open_parquet)
            yield writer
            if writer.states is None or writer.num_rows not in (0, task.num_rows):
                raise ValueError(
                    f"open_task: expected the scores of {task.num_rows:,} rows and finish(), got "
                    f"{writer.num_rows:,} rows; write all rows of the task"
                )
            writer.flush()
        states = {_state_name(task.index, name): state for name, state in writer.states.items()}
        # Each file takes its time to reach the disk or the store, and little of the processor.
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(self._write_state, states, states.values()))
        names = [part, *states] if writer.num_rows else [*states]
        marker = {
            "task": task.index,
            "counts": {kind: int(rows) for kind, rows in writer.counts.items()},
            "files": {name: self.storage.size(name) for name in names},
        }
        # A damaged marker is none.
        self.storage.write(_marker_name(task.index), json_bytes(marker), durable=False)

    def _write_state(self, name: str, state: pa.Table) -> None:
        with self.storage.open_output(name) as file, pa.ipc.new_file(file, state.schema) as arrow:
            arrow.write_table(state)

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
        with self.storage.open_output(name) as file:
            write_table(file, table)


def part_name(task: int) -> str:
    """The name of the scores of a task."""
    return f"scores/part-{task:06}.parquet"


def _state_name(task: int, name: str) -> str:
    return f"states/{name}/{task:06}.arrow"


def _marker_name(task: int) -> str:
    return f"done/{task:06}.json"


def _begin(storage: Storage, described: bytes) -> None:
    """Write the description into a folder without other files."""
    others = sorted(name for name in storage.sizes() if not is_temporary(name))
    if others == [_RUN] and _parse(storage.read(_RUN)) is None:
        # A run that ended while it wrote its first file, on a file system that shows half a file.
        storage.delete(_RUN)
    elif others and _RUN not in others:
        raise DataError(
            f"output: expected a new or empty folder, got {storage.full_name()} with "
            f"{len(others):,} files, such as {others[0]}; choose another folder"
        )
    storage.create(_RUN, described)


def _parse(content: bytes | None) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        value = json.loads(content or b"")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
