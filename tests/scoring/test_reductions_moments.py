"""Moments against NumPy in float64 on the whole data."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.scored_rows import ScoredRows, arrow_bytes, merged, reduced, task_states
from marginops.scoring import Moments


def moment_rows(count, num_classes, num_features, dtype, offset=0.0, seed=0):
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, num_features, generator=random, dtype=torch.float64) + offset
    target = torch.randint(-1, num_classes, (count,), generator=random)
    is_finite = torch.rand(count, generator=random) > 0.1
    features[~is_finite] = math.nan
    return ScoredRows(
        {"margin": features[:, 0]},
        num_classes=num_classes,
        target=target,
        features=features.to(dtype),
        is_finite=is_finite,
        ignore_index=-1,
    )


def expected_moments(rows):
    features = rows.features.double().numpy()
    for label in range(rows.num_classes):
        own = features[((rows.target == label) & rows.is_finite).numpy()]
        mean = own.mean(0) if len(own) else np.full(features.shape[1], np.nan)
        radius = math.sqrt(((own - mean) ** 2).sum(1).mean()) if len(own) else math.nan
        yield label, len(own), mean, radius


def assert_moments(reduction, rows, mean_error, radius_error):
    table = reduction.result()
    assert table["class"].to_pylist() == list(range(rows.num_classes))
    for row, (_, count, mean, radius) in zip(
        table.to_pylist(), expected_moments(rows), strict=True
    ):
        assert row["count"] == count
        np.testing.assert_allclose(row["mean"], mean, mean_error, mean_error)
        np.testing.assert_allclose(row["radius"], radius, radius_error, radius_error)


@given(
    st.integers(0, 50),
    st.integers(1, 5),
    st.integers(1, 4),
    st.lists(st.integers(0, 50), max_size=5),
    st.lists(st.integers(0, 50), max_size=5),
    st.integers(0, 2**16),
)
def test_moments_are_those_of_all_rows(count, num_classes, num_features, cuts, tasks, seed):
    rows = moment_rows(count, num_classes, num_features, torch.float64, seed=seed)
    cuts, tasks = ([min(place, count) for place in places] for places in (cuts, tasks))
    once = reduced(Moments(), rows)
    assert_moments(once, rows, 1e-13, 1e-13)
    assert_moments(reduced(Moments(), rows, cuts), rows, 1e-12, 1e-12)
    states = task_states(Moments(), rows, tasks, cuts)
    several = merged(Moments(), states)
    assert_moments(several, rows, 1e-12, 1e-12)
    assert arrow_bytes(several.state()) == arrow_bytes(merged(Moments(), states).state())
    summary = several.summary()
    json.dumps(summary, allow_nan=False)
    counts = [number for _, number, *_ in expected_moments(rows)]
    assert summary["rows"] == count and summary["left_out"] == count - sum(counts)
    assert summary["empty_classes"] == counts.count(0) and summary["classes"] == num_classes
    if not any(counts):
        assert summary["mean_radius"] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_moments_far_from_zero(dtype):
    """Mean 1e4, spread 1: a mean that is rounded to float32 would spoil the radius."""
    rows = moment_rows(40_000, 7, 5, dtype, offset=1e4 if dtype != torch.float16 else 100.0)
    states = task_states(Moments(), rows, [9000, 21_000], range(0, 40_000, 1024))
    assert_moments(merged(Moments(), states), rows, 1e-12, 1e-10)


def test_a_batch_of_several_tiles():
    rows = moment_rows(3000, 3, 1000, torch.float32, offset=3.0)  # 524 rows a tile
    assert_moments(reduced(Moments(), rows, [1700]), rows, 1e-12, 1e-11)


def test_more_classes_than_rows_of_a_batch():
    rows = moment_rows(600, 1000, 3, torch.float64)
    states = task_states(Moments(), rows, [100, 300], range(0, 600, 50))
    assert_moments(merged(Moments(), states), rows, 1e-12, 1e-12)
    counts = [count for _, count, *_ in expected_moments(rows)]
    assert sum(state.num_rows for state in states) < 600 and counts.count(0) > 500


def test_states_and_results_have_their_columns_without_rows():
    rows = moment_rows(4, 2, 3, torch.float32)
    rows.target[:] = rows.ignore_index
    reduction = reduced(Moments(), rows)
    seen = reduced(Moments(), moment_rows(40, 2, 3, torch.float32))
    assert reduction.state().num_rows == 0
    assert reduction.state().schema.names == seen.state().schema.names
    assert reduction.state().schema.field("mean").type.list_size == 3
    assert reduction.result()["count"].to_pylist() == [0, 0]
    assert np.isnan(reduction.result()["radius"].to_numpy()).all()
    before = arrow_bytes(seen.state())
    seen.merge(Moments().state())
    assert arrow_bytes(seen.state()) == before


def test_tensors_of_inference_mode_and_with_gradient():
    rows = moment_rows(50, 3, 2, torch.float64)
    rows.features.requires_grad_()
    reduction = Moments()
    with torch.inference_mode():
        reduction.update(rows.batch(0, 20))
    reduction.update(rows.batch(20, 50))
    rows.features.requires_grad_(False)
    assert_moments(reduction, rows, 1e-12, 1e-12)


def test_what_a_batch_must_have():
    rows = ScoredRows({"margin": torch.zeros(2)}, features=torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"^scored: expected labels, got none; name their column"):
        Moments().update(rows.batch(0, 2))
    rows = ScoredRows({"margin": torch.zeros(2)}, target=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^scored: expected features, got None"):
        Moments().update(rows.batch(0, 2))
