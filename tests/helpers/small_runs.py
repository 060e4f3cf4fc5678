"""Runs with a scorer and a reduction of a few lines, and file systems that fail when told to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from marginops.scoring import DataError, Reduction, outputs, storage
from marginops.scoring.description import describe_run
from marginops.scoring.finish import finish
from marginops.scoring.folder import RunFolder
from marginops.scoring.plan import Plan


class SmallScorer:
    """What plans and folders ask a scorer for. The score of a row is its number."""

    def __init__(
        self, column: str = "row", target: str | None = None, batch_rows: int | None = None
    ):
        self.column, self.target, self.batch_rows = column, target, batch_rows

    @property
    def columns(self) -> list[str]:
        return [self.column] + ([self.target] if self.target else [])

    def check_schema(self, schema: pa.Schema) -> None:
        for name in self.columns:
            if name not in schema.names:
                raise DataError(f"column: expected {name}, got {', '.join(schema.names)}")

    def describe(self) -> dict[str, Any]:
        return {"column": self.column, "statistics": ["margin"], "head": {"sha256": "a" * 64}}


class Concatenation(Reduction):
    """Keeps the first rows of all tasks in the order in which states are merged."""

    name = "first_rows"
    statistics = ("margin",)

    def __init__(self) -> None:
        self.rows: list[int] = []

    def describe(self) -> dict[str, Any]:
        return {}

    def update(self, scored: int) -> None:  # type: ignore[override]
        self.rows.append(scored)

    def state(self) -> pa.Table:
        return pa.table({"first_row": pa.array(self.rows, pa.int64())})

    def merge(self, state: pa.Table) -> None:
        self.rows += state["first_row"].to_pylist()

    def result(self) -> pa.Table:
        return self.state()

    def summary(self) -> dict[str, Any]:
        return {"tasks": len(self.rows), "mean": float(np.mean(self.rows or [np.nan]))}


def write_rows(path: Path, row_groups: Sequence[int], first_row: int = 0) -> int:
    """Write a Parquet file whose column ``row`` numbers its rows; returns the next row."""
    schema = pa.schema({"row": pa.int64()})
    with pq.ParquetWriter(path, schema) as writer:
        for rows in row_groups:
            writer.write_table(
                pa.table({"row": range(first_row, first_row + rows)}, schema), rows or 1
            )
            first_row += rows
    return first_row


def run(location: str | Path, plan: Plan, batch: int = 3) -> dict[str, Any]:
    """Do what a run with one worker does: open the folder, score what is missing, finish."""
    folder = RunFolder.open(location, describe_run(SmallScorer(), plan, [Concatenation()]))
    finished = folder.finished()
    for task in plan.tasks:
        if task.index not in finished:
            write_task(folder, task, batch)
    return finish(folder, plan, [Concatenation()])


def write_task(folder: RunFolder, task: Any, batch: int = 3) -> None:
    reduction = Concatenation()
    reduction.update(task.first_row)
    rows = np.arange(task.first_row, task.first_row + task.num_rows)
    with folder.open_task(task) as writer:
        for start in range(0, task.num_rows, batch):
            part = rows[start : start + batch]
            writer.write(pa.record_batch({"id": part, "margin": part.astype(np.float32)}))
        writer.finish({reduction.name: reduction.state()}, {"rows": task.num_rows})


def digests(location: str | Path) -> dict[str, str]:
    """The digest of each file of a folder, temporary ones included."""
    files = storage.Storage(location)
    return {name: hashlib.sha256(files.read(name)).hexdigest() for name in files.sizes()}


def json_of(location: str | Path, name: str) -> Any:
    return json.loads(storage.Storage(location).read(name))


class Crash:
    """Lets all operations fail after some number of them, as the end of a process does."""

    def __init__(self) -> None:
        self.operations = 0
        self.last: int | None = None

    def count(self) -> None:
        self.operations += 1
        if self.last is not None and self.operations > self.last:
            raise OSError("crashed")


@contextlib.contextmanager
def crashing_disk(monkeypatch: Any, last: int | None) -> Iterator[Crash]:
    """Let the local disk fail after ``last`` operations. A failing write writes half the bytes."""
    crash = Crash()
    crash.last = last

    class Disk:
        def __getattr__(self, name: str) -> Any:
            function = getattr(os, name)
            if name not in ("fsync", "replace", "link", "unlink", "makedirs", "open", "close"):
                return function

            def counted(*arguments: Any, **options: Any) -> Any:
                crash.count()
                # The bytes need no disk, which takes most of the time.
                return None if name == "fsync" else function(*arguments, **options)

            return counted

    def write(file: Any, content: Any) -> int:
        with outputs.output_errors(file._full_name):
            try:
                crash.count()
            except OSError:
                file._file.write(memoryview(content).cast("B")[: len(memoryview(content)) // 2])
                file._file.flush()
                raise
            return file._file.write(content)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "os", Disk())
        patch.setattr(outputs.OutputFile, "write", write)
        yield crash


class CrashingFile(MemoryFile):
    """A file that others see while it is written."""

    def write(self, content: Any) -> int:
        try:
            CrashingFileSystem.crash.count()
        except OSError:
            super().write(bytes(content)[: len(content) // 2])
            raise
        return super().write(content)


class CrashingFileSystem(MemoryFileSystem):
    """A file system in memory that fails after some number of operations that change it."""

    protocol = "crashing"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    crash = Crash()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = path.removeprefix("crashing://")
        return f"/{path.strip('/')}" if path.strip("/") else ""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **options)
        self.crash.count()
        file = CrashingFile(self, self._strip_protocol(path))
        file.commit()
        return file

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.crash.count()
        super().makedirs(path, exist_ok)

    def rm_file(self, path: str) -> None:
        self.crash.count()
        super().rm_file(path)


fsspec.register_implementation("crashing", CrashingFileSystem, clobber=True)


@contextlib.contextmanager
def crashing_memory(last: int | None) -> Iterator[Crash]:
    CrashingFileSystem.crash = Crash()
    CrashingFileSystem.crash.last = last
    yield CrashingFileSystem.crash
    CrashingFileSystem.crash = Crash()
