"""A Scorer in a user's own pipeline of Ray Data, with checkpoints of Ray Data."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.processes import alive, python, wait_until
from marginops.scoring import Scorer, score_files

pytest.importorskip("ray")

from helpers.ray_runs import write_data

pytestmark = pytest.mark.slow
ROWS = 6000
# Ray Data filters rows in an actor when it goes on. So there are CPUs for that one, for the scorer,
# for reading and for writing. Blocks are small, so that a checkpoint has a part of the rows.
PIPELINE = """
import sys
import time
import ray
from ray.data.checkpoint import CheckpointConfig
from marginops.scoring import Scorer

data, output, batches = sys.argv[1], sys.argv[2], int(sys.argv[3])

class StallingScorer(Scorer):
    seen = 0

    def __call__(self, batch):
        if self.seen == batches:
            time.sleep(3600)
        self.seen += 1
        return super().__call__(batch)

ray.init("local", num_cpus=4, object_store_memory=128 << 20, include_dashboard=False)
context = ray.data.DataContext.get_current()
context.target_max_block_size = 1 << 16
context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=f"{output}/checkpoint")
rows = ray.data.read_parquet(f"{data}/0.parquet")
scores = rows.map_batches(
    StallingScorer,
    fn_constructor_args=[f"{data}/head.safetensors"],
    fn_constructor_kwargs={"target": "label", "id": "id"},
    batch_format="pyarrow",
    batch_size=256,
    compute=ray.data.ActorPoolStrategy(size=1),
)
scores.write_parquet(f"{output}/scores")
"""


def test_a_killed_pipeline_goes_on_with_every_id_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    data = tmp_path / "data"
    data.mkdir()
    write_data(data, files=1, rows=ROWS)

    process = python(PIPELINE, data, tmp_path, ROWS // 512)
    wait_until(lambda: not alive(process.pid) or has_committed(tmp_path / "checkpoint"))
    process.kill()
    _, log = process.communicate()
    kept = {file.name for file in (tmp_path / "scores").glob("*.parquet")}
    assert kept, log
    assert pq.read_table(tmp_path / "scores").num_rows < ROWS

    process = python(PIPELINE, data, tmp_path, ROWS)
    _, log = process.communicate()
    assert process.returncode == 0, log
    found = pq.read_table(tmp_path / "scores").sort_by("id")
    assert found["id"].to_pylist() == list(range(ROWS))
    assert len({file.name for file in (tmp_path / "scores").glob("*.parquet")} - kept) > 0

    score_files(
        data,
        Scorer(data / "head.safetensors", target="label", id="id"),
        tmp_path / "local",
        workers=1,
    )
    expected = pq.read_table(tmp_path / "local" / "scores").sort_by("id")
    np.testing.assert_allclose(found["margin"], expected["margin"], rtol=1e-5, atol=1e-5)


def has_committed(folder: Path) -> bool:
    """Whether there is a checkpoint. Ray Data announces each before it writes the rows."""
    return any(not file.name.endswith(".pending.parquet") for file in folder.glob("*.parquet"))
