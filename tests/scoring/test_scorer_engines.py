"""A Scorer in engines that map a function over batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.scored_heads import CLASSES, WIDTH, fixed_lists
from marginops.scoring import Scorer

ROWS = 300


def test_daft(tmp_path: Path) -> None:
    daft = pytest.importorskip("daft", reason="daft is not installed")
    features = np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)
    columns = {"label": np.arange(ROWS) % CLASSES, "key": [f"s{row}" for row in range(ROWS)]}
    table = pa.table({"embedding": fixed_lists(features), **columns})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    scorer = Scorer("helpers.scored_heads:pair", target="label", id="key")

    @daft.func.batch(return_dtype=daft.DataType.float32())
    def margin(embedding: daft.Series, label: daft.Series, key: daft.Series) -> daft.Series:
        given = {"embedding": embedding, "label": label, "key": key}
        result = scorer({name: series.to_arrow() for name, series in given.items()})
        return daft.Series.from_numpy(result["margin"])

    frame = daft.read_parquet(str(tmp_path / "rows.parquet"))
    scores = margin(frame["embedding"], frame["label"], frame["key"]).alias("margin")
    result = frame.select(frame["key"], scores).to_pydict()
    wanted = scorer(table)
    assert dict(zip(result["key"], result["margin"], strict=True)) == pytest.approx(
        dict(zip(wanted["key"], wanted["margin"].tolist(), strict=True)), rel=1e-5, abs=1e-6
    )
