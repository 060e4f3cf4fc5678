"""Parquet files to score, scorers that wait, and what a run left in its folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.processes import wait_until
from marginops.scoring import Scorer


def rows_of_logits(count: int, classes: int = 5, seed: int = 0, *, ties: bool = True) -> pa.Table:
    """Ids in no order, labels of which some are null, and float16 logits with equal values."""
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((count, classes)).astype(np.float16)
    if ties:
        logits = np.round(logits * 4) / 4
    label = generator.integers(0, classes, count)
    return pa.table(
        {
            "id": generator.permutation(count),
            "label": pa.array(label, mask=label == generator.integers(0, 9, count)),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), classes),
        }
    )


def write_parquet(path: Path, rows: pa.Table, row_group_size: int) -> Path:
    """Write rows without compression or dictionary, in small pages."""
    pq.write_table(
        rows,
        path,
        row_group_size=row_group_size,
        compression="none",
        use_dictionary=False,
        data_page_size=4096,
    )
    return path


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder, by its name relative to it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def children(process: int) -> list[int]:
    """The processes that a process started and that have not been waited for."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def workers_of(process: int) -> list[int]:
    """The worker processes of a run: the children of its server."""
    return [worker for server in children(process) for worker in children(server)]


class WaitingScorer(Scorer):
    """Notes its process at a gate and waits there, before it scores row ``first_row`` or later."""

    gate: Path
    first_row: int

    def behind(self, gate: Path, first_row: int = 0) -> WaitingScorer:
        gate.mkdir(exist_ok=True)
        self.gate, self.first_row = gate, first_row
        return self

    def score(self, batch: Any, first_row: int = 0, **options: Any) -> Any:
        if first_row >= self.first_row:
            (self.gate / str(os.getpid())).touch()
            wait_until((self.gate / "open").exists)
        return super().score(batch, first_row, **options)


class ForkingScorer(WaitingScorer):
    """Notes its process at a gate and forks one that lives until the gate opens."""

    has_forked = False

    def score(self, batch: Any, first_row: int = 0, **options: Any) -> Any:
        if not self.has_forked:
            self.has_forked = True
            if os.fork() == 0:
                wait_until((self.gate / "open").exists)
                os._exit(0)
            (self.gate / str(os.getpid())).touch()
        return Scorer.score(self, batch, first_row, **options)


def waiting(gate: Path) -> list[int]:
    """The processes that noted themselves at a gate."""
    return [int(path.name) for path in gate.glob("[0-9]*")]
