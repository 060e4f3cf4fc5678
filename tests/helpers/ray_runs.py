"""Nodes of Ray on this machine, and scorers that end their process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from helpers.processes import INSTALLED
from marginops.scoring import Scorer

WIDTH, CLASSES = 17, 5
TESTS = Path(__file__).resolve().parents[1]
_NODE = {"num_cpus": 1, "object_store_memory": 128 << 20}


def write_data(folder: Path, files: int, rows: int) -> None:
    """Write ``files`` of features with labels and ids, and a head.

    Row groups have odd lengths, so that batches begin anywhere in them.
    """
    generator = np.random.default_rng(1)
    for part in range(files):
        features = generator.standard_normal((rows, WIDTH)).astype(np.float32)
        columns = {
            "id": generator.permutation(rows) + part * rows,
            "label": generator.integers(0, CLASSES, rows),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), WIDTH),
        }
        pq.write_table(pa.table(columns), folder / f"{part}.parquet", row_group_size=301)
    weights = {"weight": torch.randn(CLASSES, WIDTH), "bias": torch.randn(CLASSES)}
    save_file(weights, folder / "head.safetensors")


@contextlib.contextmanager
def two_nodes() -> Iterator[Cluster]:
    """A cluster of two nodes with one CPU each; the first also has something like a GPU.

    This process is connected to the first node.
    """
    # Paths of sockets have about 100 characters at most.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    cluster = Cluster()
    environment = pytest.MonkeyPatch()
    # Ray notes the address of the cluster in the folder "ray" below this one, and does not make it.
    environment.setenv("RAY_TMPDIR", folder)
    Path(folder, "ray").mkdir()
    # Actors import what tests import.
    environment.setenv("PYTHONPATH", os.pathsep.join([INSTALLED, str(TESTS)]))
    environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        cluster.add_node(num_gpus=1, temp_dir=folder, include_dashboard=False, **_NODE)
        add_node(cluster)
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        environment.undo()
        shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Cluster) -> Any:
    return cluster.add_node(**_NODE)


def raylet(node: Any) -> int:
    """The process of a node that is the parent of its actors."""
    (process,) = node.all_processes["raylet"]
    return process.process.pid


def parent(process: int) -> int:
    """The parent of a process; 0 if the process has ended."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{process}/stat").read_text()
        return int(text.rpartition(")")[2].split()[1])
    return 0


class DeadlyScorer(Scorer):
    """Ends its process before it scores row ``first_row``."""

    first_row: int

    def score(self, batch: Any, first_row: int = 0, **options: Any) -> Any:
        if first_row == self.first_row:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(batch, first_row, **options)


class BoundScorer(Scorer):
    """Needs a module that only its own process has."""

    process: int

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["process"] != os.getpid():
            raise ModuleNotFoundError("No module named 'of_the_user'")
        vars(self).update(state)
