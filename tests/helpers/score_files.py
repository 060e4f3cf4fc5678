"""Files of embeddings and a head, for the tests of ``marginops score``, and their margins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from marginops.commands import cli

ROWS, WIDTH, CLASSES = 700, 6, 4


class Embeddings:
    """Rows in two files of several row groups, and the file of a head."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.folder = folder
        self.data = folder / "data"
        self.weight = random.standard_normal((CLASSES, WIDTH)).astype(np.float32)
        self.bias = random.standard_normal(CLASSES).astype(np.float32)
        self.label = random.integers(0, CLASSES, ROWS)
        noise = random.standard_normal((ROWS, WIDTH))
        self.values = (noise + self.weight[self.label]).astype(np.float16)
        self.id = random.permutation(ROWS)
        self.data.mkdir(parents=True)
        torch.save(
            {"weight": torch.tensor(self.weight), "bias": torch.tensor(self.bias)},
            folder / "head.pt",
        )
        self.write()

    def write(self, **columns: Any) -> None:
        """Write the files. ``columns`` replaces some of them."""
        lists = pa.FixedSizeListArray.from_arrays(pa.array(self.values.ravel()), WIDTH)
        table = pa.table({"id": self.id, "label": self.label, "embedding": lists, **columns})
        half = ROWS // 2
        for name, part in (("a", table[:half]), ("b", table[half:])):
            pq.write_table(part, self.data / f"{name}.parquet", row_group_size=100)

    @property
    def logits(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        return self.values.astype(np.float32) @ self.weight.T + self.bias

    @property
    def margin(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        rows = np.arange(ROWS)
        others = self.logits.copy()
        others[rows, self.label] = -np.inf
        return self.logits[rows, self.label] - others.max(1)

    def run(self, *options: Any, output: str = "out") -> int:
        """Run the command on the files, in this process, with 100 rows a task."""
        return score(
            self.data,
            *("--head", self.folder / "head.pt", "--column", "embedding"),
            *("--output", self.folder / output, "--task-rows", 100, "--workers", 1),
            *options,
        )


def score(*arguments: Any) -> int:
    """Run ``marginops score`` in this process, and return the exit status."""
    return cli.main(["score", *map(str, arguments)])
