"""Scorer with a model: what the network sees, and what its logits give."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from helpers import scored_heads as heads
from helpers.scored_heads import CLASSES, WIDTH, fixed_lists, linear
from marginops.scoring import DataError, Scorer


class Images(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (2, 3)
        return images.float().sum(2)


def images() -> nn.Module:
    return Images()


class Inputs(nn.Module):
    """Returns what it sees."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(len(values), -1)


def inputs() -> nn.Module:
    return Inputs()


class Doubled(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.double()


def doubled() -> nn.Module:
    return Doubled()


class Writing(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.mul_(2)


def writing() -> nn.Module:
    return Writing()


class Overflowing(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * 1e38


def overflowing() -> nn.Module:
    return Overflowing()


def three_rows() -> nn.Module:
    return nn.Flatten(0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_model_of_a_head_scores_like_the_head(dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal((2500, WIDTH)).astype(dtype)
    batch = {"embedding": values.astype(np.float32), "label": np.arange(2500) % CLASSES}
    names = ("margin", "entropy", "prediction")
    wanted = Scorer(linear, target="label", statistics=names)(batch)
    scorer = Scorer(model=heads.noted, target="label", statistics=names)
    for form in (values, fixed_lists(values)):
        got = scorer(batch | {"embedding": form})
        np.testing.assert_array_equal(got["prediction"], wanted["prediction"])
        np.testing.assert_allclose(got["margin"], wanted["margin"], 1e-4, 2e-5)
        np.testing.assert_allclose(got["entropy"], wanted["entropy"], 1e-4, 1e-5)
    assert scorer.num_classes == CLASSES


def test_texts_are_one_list_without_missing_ones() -> None:
    texts = ["abc", None, "zz", "m"]
    wanted = [2.0, np.nan, 24.0, 12.0]
    for form in (pa.array(texts), texts, np.array(texts, dtype=object)):
        scored = Scorer(model=heads.words, column="text").score({"text": form})
        np.testing.assert_array_equal(scored.values["top2_margin"], wanted)
        assert scored.counts["missing"] == 1
        assert scored.features is None
    kept = Scorer(model=heads.words, column="text").score({"text": texts[:1]}, features=True)
    assert kept.features is not None
    assert kept.features.tolist() == [[3.0, 1.0]]


def test_images_keep_their_shape_and_integers() -> None:
    values = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    storage = fixed_lists(values.reshape(4, 6))
    tensors = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), [2, 3]), storage)
    for form in (values, torch.from_numpy(values), tensors):
        assert Scorer(model=images)({"embedding": form})["top2_margin"].tolist() == [9.0] * 4


def test_rows_of_a_model_that_are_not_finite() -> None:
    values = torch.tensor([[1.0, 2], [torch.nan, 1], [1, torch.inf], [1, 9], [2, 3]])
    scored = Scorer(model=overflowing).score({"embedding": values})
    assert scored.is_finite.tolist() == [True, False, False, False, True]
    assert [scored.counts[name] for name in ("nan", "infinite", "overflow")] == [1, 1, 1]
    scored = Scorer(model=overflowing).score({"embedding": torch.tensor([[1, 9]])})
    assert (scored.counts["overflow"], scored.counts["infinite"]) == (1, 0)
    numbers = pa.array([1.0, None, float("nan"), 3.0])
    with pytest.raises(DataError, match="expected logits of at least 2 classes"):
        Scorer(model=inputs).score({"embedding": numbers})
    rows = pa.array([[1.0, 2], None, [float("nan"), 1], [3, None]], pa.list_(pa.float32(), 2))
    scored = Scorer(model=inputs).score({"embedding": rows})
    assert [scored.counts[name] for name in ("missing", "nan", "infinite")] == [2, 1, 0]
    np.testing.assert_array_equal(scored.values["top2_margin"], [1, np.nan, np.nan, np.nan])


def test_a_network_may_write_into_its_input() -> None:
    values = np.arange(24, dtype=np.float32).reshape(12, 2)
    table = pa.table({"embedding": fixed_lists(values.copy())})
    for batch in (table, {"embedding": torch.from_numpy(values.copy())}):
        scored = [Scorer(model=writing)(batch)["top2_margin"].tolist() for _ in range(2)]
        assert scored == [[2.0] * 12] * 2
    assert table["embedding"].combine_chunks().flatten().to_pylist() == values.ravel().tolist()


def test_batches_without_values() -> None:
    scorer = Scorer(model=heads.words, column="text", target="y")
    empty = pa.table({"text": pa.array([], pa.string()), "y": pa.array([], pa.int64())})
    assert scorer(empty)["margin"].shape == (0,)
    nulls = pa.table({"text": pa.array([None], pa.string()), "y": [1]})
    with pytest.raises(DataError, match="expected a value in the first rows of 'text', from which"):
        scorer(nulls)
    scorer({"text": ["a"], "y": [0]})
    assert np.isnan(scorer(nulls)["margin"]).tolist() == [True]
    logits = pa.table({"embedding": pa.array([None, [1.0, 2.0]], pa.list_(pa.float64()))})
    scorer = Scorer()
    with pytest.raises(DataError, match="expected a value in the first rows of 'embedding', from"):
        scorer(logits[:1])
    scorer(logits[1:])
    assert np.isnan(scorer(logits[:1])["top2_margin"]).tolist() == [True]


def test_a_batch_without_values_has_the_dtype_of_the_others() -> None:
    scorer = Scorer(model=doubled)
    rows = pa.table({"embedding": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))})
    assert scorer(rows)["top2_margin"].dtype == np.float64
    assert scorer(rows[1:])["top2_margin"].dtype == np.float64


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (heads.number, TypeError, "model: expected helpers.scored_heads:number to return a torch"),
        (three_rows, ValueError, r"network: expected logits of shape \[B, C\], got \[6\]"),
        (heads.needs_an_argument, TypeError, "model: expected a function without arguments, got"),
        ("helpers.scored_heads:nothing", ValueError, "model: expected MODULE:FUNCTION with a func"),
        ("nowhere_at_all:f", ValueError, "model: expected MODULE:FUNCTION with a module that Pyth"),
    ],
)
def test_wrong_models(model: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Scorer(model=model)({"embedding": np.ones((3, 2), np.float32)})  # type: ignore[arg-type]
