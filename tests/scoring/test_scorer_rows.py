"""Rows that are null, not finite or without a label: counted, marked, and never an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from helpers.scored_heads import WIDTH, linear
from marginops.scoring import Scorer
from marginops.scoring.head import Head
from marginops.scoring.statistics import STATISTICS
from marginops.scoring.tiles import KINDS, PlacedHead, finish, score_rows

CPU = torch.device("cpu")
CLASS_NUMBERS = {"rival": -1, "prediction": -1, "correct": 0}


def placed(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PlacedHead:
    return PlacedHead(Head(weight, bias, "here"), CPU)


def assert_marked(values: dict[str, torch.Tensor], rows: list[int], count: int) -> None:
    """These rows, and no others, are marked as not finite."""
    marked = torch.zeros(count, dtype=torch.bool)
    marked[rows] = True
    for name, value in values.items():
        if name == "correct":
            assert not value[marked].any()
        elif name in CLASS_NUMBERS:
            assert torch.equal(value == -1, marked), name
        else:
            assert torch.equal(value.isnan(), marked), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [4, 5000])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_every_value_that_is_not_finite_is_found(
    dtype: torch.dtype, classes: int, value: float
) -> None:
    features = torch.randn(2060, WIDTH).to(dtype)
    rows = [*range(0, WIDTH * 250, 250), 2059]
    for column, row in enumerate(rows):
        features[row, column % WIDTH] = value
    weight = torch.randn(classes, WIDTH)
    weight[:, 3] = 0  # 0 * inf
    names = [name for name in STATISTICS if classes < 5000 or name != "gradient_norm"]
    scores = score_rows(features, torch.zeros(2060, dtype=torch.int64), None, names,
                        placed(weight), CPU, None)  # fmt: skip
    is_finite, counts = finish(scores, None)
    kind = "nan" if value != value else "infinite"
    assert counts == {"missing": 0, "nan": 0, "infinite": 0, "overflow": 0} | {kind: len(rows)}
    assert_marked(scores.values, rows, 2060)
    assert (~is_finite).nonzero().flatten().tolist() == rows


@pytest.mark.parametrize("classes", [4, 5000])
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_of_one_logit_that_no_statistic_reads(classes: int, sign: int) -> None:
    features = torch.ones(10, WIDTH)
    features[3] = 1e38
    weight = torch.zeros(classes, WIDTH)
    weight[0, 0], weight[1, 0], weight[-1] = 1e-3, 2e-3, sign
    scores = score_rows(features, torch.zeros(10, dtype=torch.int64), None, ("margin",),
                        placed(weight), CPU, None)  # fmt: skip
    _, counts = finish(scores, None)
    assert counts == {"missing": 0, "nan": 0, "infinite": 0, "overflow": 1}
    assert_marked(scores.values, [3], 10)


def test_large_values_without_overflow_are_finite() -> None:
    features = torch.full((10, WIDTH), 1e30)  # their squares are no float32
    head = placed(torch.eye(3, WIDTH))
    scores = score_rows(features, None, None, ("top2_margin",), head, CPU, None)
    is_finite, _ = finish(scores, None)
    assert is_finite.all()
    assert scores.values["top2_margin"].tolist() == [0.0] * 10


def test_a_large_bias_overflows() -> None:
    head = placed(torch.eye(2), torch.tensor([3e38, 0.0]))
    features = torch.tensor([[3e38, 0.0], [0.0, 0.0]])
    scores = score_rows(features, None, None, ("top2_margin",), head, CPU, None)
    assert scores.kinds.tolist() == [KINDS.index("overflow"), 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    logits = torch.randn(2100, 6)
    logits[2077, 4] = value
    logits[2077, 0] = 9
    scorer = Scorer(column="logits", statistics=("top2_margin", "prediction"))
    scored = scorer.score({"logits": logits})
    assert scored.counts["nan" if value != value else "infinite"] == 1
    assert_marked(scored.values, [2077], 2100)


def test_missing_rows_and_rows_with_a_null() -> None:
    rows: list[Any] = [[float(value)] * WIDTH for value in range(6)]
    rows[1] = None
    rows[3] = [*rows[3][:-1], None]
    rows[4] = [float("nan"), None, *rows[4][2:]]
    for kind in (
        pa.list_(pa.float32(), WIDTH),
        pa.list_(pa.float32()),
        pa.large_list(pa.float32()),
    ):
        table = pa.table({"embedding": pa.array(rows, kind)})
        for start in (0, 1, 2):
            scored = Scorer(linear, statistics=("minimal_margin", "prediction")).score(
                table.slice(start)
            )
            wrong = [row - start for row in (1, 3, 4) if row >= start]
            assert scored.counts["missing"] == len(wrong)
            assert scored.counts["nan"] == 0
            assert_marked(scored.values, wrong, 6 - start)
    scored = Scorer(linear).score({"embedding": [None, np.ones(WIDTH, np.float16), None]})
    assert scored.counts["missing"] == 2
    nothing = pa.table({"embedding": pa.array([None, None], pa.list_(pa.float32()))})
    scored = Scorer(linear).score(nothing)
    assert (scored.counts["rows"], scored.counts["missing"]) == (2, 2)


def test_rows_without_a_label() -> None:
    features = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    features[4] = np.nan
    scorer = Scorer(linear, target="label", statistics=STATISTICS, ignore_index=-1)
    label = pa.array([0, None, -1, 3, None], pa.int16())
    scored = scorer.score({"embedding": features, "label": label})
    assert scored.target is not None
    assert scored.target.tolist() == [0, -1, -1, 3, -1]
    assert scored.ignore_index == -1
    assert (scored.counts["unlabelled"], scored.counts["nan"]) == (3, 1)
    assert_marked(scored.values, [4], 5)
    free = Scorer(linear, statistics=("top2_margin", "entropy", "prediction", "minimal_margin"))
    alone = free.score({"embedding": features})
    for name, value in alone.values.items():
        torch.testing.assert_close(scored.values[name], value, rtol=0, atol=0, equal_nan=True)
    perfect = {"margin": torch.inf, "loss": 0, "confidence": 1, "el2n": 0, "gradient_norm": 0,
               "rival": 0, "correct": True}  # fmt: skip
    for name, value in perfect.items():
        assert scored.values[name][1:3].tolist() == [value, value]
        assert scored.values[name][0] != value or name in ("rival", "correct")


@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_labels_of_any_integer_type(kind: str) -> None:
    features = np.zeros((3, WIDTH), np.float32)
    wanted = Scorer(linear, target="y")({"embedding": features, "y": [4, 0, 2]})
    label = np.array([4, 0, 2], kind)
    for form in (label, pa.array(label), [*label]):
        got = Scorer(linear, target="y")({"embedding": features, "y": form})
        assert got["y"].dtype == np.int64
        np.testing.assert_array_equal(got["margin"], wanted["margin"])
