"""Margins against MarginDistribution in one pass, NumPy and SciPy."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.scored_rows import ScoredRows, arrow_bytes, merged, reduced, task_states
from marginops.metrics import MarginDistribution
from marginops.scoring import Margins

_special = st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-45, -1e-40, 3.4e38, -3e38])


@st.composite
def margin_rows(draw):
    values = draw(st.lists(st.floats(-10, 10, width=32) | _special, max_size=40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    margins = torch.tensor(values, dtype=torch.float64).to(dtype)
    finite = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    rows = ScoredRows({"margin": margins}, is_finite=torch.tensor(finite, dtype=torch.bool))
    places = st.lists(st.integers(0, len(values)), max_size=5)
    return rows, draw(places), draw(places)


def counted_margins(rows):
    margins = rows.values["margin"].numpy().astype(np.float64)
    return margins[rows.is_finite.numpy() & (margins > -math.inf)]


@given(margin_rows())
def test_margins_are_those_of_the_metric_in_one_pass(case):
    rows, cuts, tasks = case
    counted = counted_margins(rows)
    metric = MarginDistribution()
    metric.update(torch.from_numpy(counted).to(rows.values["margin"].dtype))
    want = metric.compute()
    for reduction in (
        reduced(Margins("margin"), rows, cuts),
        merged(Margins("margin"), task_states(Margins("margin"), rows, tasks, cuts)),
    ):
        summary = reduction.summary()
        json.dumps(summary, allow_nan=False)
        assert summary["rows"] == rows.num_rows
        assert summary["left_out"] == rows.num_rows - len(counted)
        for name in ("count", "ignored", "support_vectors"):
            assert summary[name] == getattr(want, name).tolist()
        for name in ("mean", "minimum", "maximum", "area", "area_cdf", "separation"):
            assert_equal_or_none(summary[name], getattr(want, name).item())
        assert list(summary["quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
        for share, value in zip(
            summary["quantiles"].values(), want.quantiles.tolist(), strict=True
        ):
            assert_equal_or_none(share, value)


def assert_equal_or_none(value, want):
    if math.isfinite(want):
        assert value == pytest.approx(want, rel=1e-12, abs=1e-12 * 3.4e38 if want > 1e30 else 1e-9)
    else:
        assert value is None


@given(margin_rows())
def test_every_margin_lies_in_its_bin(case):
    rows, cuts, tasks = case
    counted = counted_margins(rows)
    counted = counted[counted < math.inf]
    states = task_states(Margins("margin"), rows, tasks, cuts)
    reduction = merged(Margins("margin"), states)
    bins = reduction.result()
    lower, upper, count = (bins[name].to_numpy() for name in ("lower", "upper", "count"))
    assert (lower < upper).all() and (upper[:-1] <= lower[1:]).all() and (count > 0).all()
    edges = np.unique(np.concatenate((lower, upper)))
    # Bins are half open on the side away from 0, and 0 and -0 have bins of their own.
    magnitude = np.abs(counted.astype(np.float32).astype(np.float64))
    for sign, is_sign in ((1, ~np.signbit(counted)), (-1, np.signbit(counted))):
        own = edges[sign * edges >= 0] * sign
        own.sort()
        want = np.histogram(magnitude[is_sign], own)[0] if len(own) > 1 else np.zeros(0, int)
        have = {
            near: amount
            for near, far, amount in zip(
                np.minimum(np.abs(lower), np.abs(upper)), lower + upper, count, strict=True
            )
            if far * sign > 0
        }
        assert {near: amount for near, amount in zip(own, want, strict=False) if amount} == have
    assert sum(count) == len(counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_summary_of_many_margins_in_numpy_and_scipy(dtype):
    random = torch.Generator().manual_seed(5)
    margins = (torch.randn(50_000, generator=random, dtype=torch.float64) * 3 + 1).to(dtype)
    margins[::100] = math.inf  # without a label
    rows = ScoredRows({"margin": margins})
    states = task_states(Margins("margin"), rows, [10_000, 30_000], range(0, 50_000, 777))
    reduction = merged(Margins("margin"), states)
    summary = reduction.summary()
    counted = margins[margins < math.inf].double().numpy()
    assert summary["count"] == len(counted) and summary["ignored"] == 500
    assert summary["mean"] == pytest.approx(counted.mean(), rel=1e-12)
    assert summary["minimum"] == counted.min() and summary["maximum"] == counted.max()
    assert summary["separation"] == pytest.approx((counted > 0).mean(), rel=1e-15)
    for share, value in summary["quantiles"].items():
        assert value == pytest.approx(np.quantile(counted, float(share)), rel=0.004)
    bins = reduction.result()
    lower, upper = bins["lower"].to_numpy(), bins["upper"].to_numpy()
    assert (upper - lower <= 2**-7 * np.maximum(np.abs(lower), np.abs(upper)) + 1e-300).all()
    # The distribution function at the edges of the bins is the empirical one.
    shares = scipy.stats.ecdf(counted).cdf.evaluate(upper)
    np.testing.assert_allclose(np.cumsum(bins["count"].to_numpy()) / len(counted), shares, 1e-3)


def test_the_state_holds_the_bins_that_occur():
    rows = ScoredRows({"margin": torch.tensor([1.0, 1.0, -2.0, math.inf])})
    state = reduced(Margins("margin"), rows).state()
    assert state.to_pydict() == {"bin": [0x3F80, 0xC000], "count": [2, 1]}
    assert state.nbytes == 24
    empty = Margins("margin").state()
    assert empty.schema.names == state.schema.names and empty.num_rows == 0


def test_a_margin_beyond_float32_has_a_bin():
    rows = ScoredRows({"margin": torch.tensor([1e300, -1e300, 3.4e38], dtype=torch.float64)})
    bins = reduced(Margins("margin"), rows).result()
    most = 2.0**128
    assert bins["lower"].to_pylist()[0] == -math.inf and bins["upper"].to_pylist()[0] == -most
    assert bins["lower"].to_pylist()[2] == most and bins["upper"].to_pylist()[2] == math.inf
    assert bins["lower"].to_pylist()[1] < 3.4e38 < bins["upper"].to_pylist()[1] == most


def test_another_score_counts_no_rows_without_a_label():
    values = {"loss": torch.tensor([0.0, 0.5, 2.0]), "entropy": torch.tensor([1.0, 2.0, 3.0])}
    rows = ScoredRows(values, target=torch.tensor([-100, 0, 1]))
    loss, entropy = (reduced(Margins(name), rows).summary() for name in ("loss", "entropy"))
    assert (loss["count"], loss["ignored"], loss["mean"]) == (2, 1, 1.25)
    assert (entropy["count"], entropy["ignored"], entropy["mean"]) == (3, 0, 2.0)


def test_merging_in_the_same_order_gives_the_same_bits():
    random = torch.Generator().manual_seed(6)
    rows = ScoredRows({"margin": torch.randn(5000, generator=random)})
    states = task_states(Margins("margin"), rows, [1000, 2500], range(0, 5000, 97))
    first, second = (merged(Margins("margin"), states) for _ in range(2))
    assert arrow_bytes(first.state()) == arrow_bytes(second.state())
    assert first.summary() == second.summary()


@pytest.mark.parametrize(
    ("default", "has_target", "statistic"),
    [
        ("loss", True, "margin"),
        ("loss", False, "margin"),  # a scorer without labels has no loss
        ("minimal_margin", True, "margin"),
        ("minimal_margin", False, "top2_margin"),
        ("entropy", False, "top2_margin"),
    ],
)
def test_default_statistic(default, has_target, statistic):
    assert Margins().statistics == ()
    assert Margins().resolved(default, has_target=has_target).statistics == (statistic,)
    named = Margins("minimal_margin").resolved(default, has_target=has_target)
    assert named.statistics == ("minimal_margin",)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r'^by: expected "margin", .*, got \'rival\'$'):
        Margins("rival")
    with pytest.raises(TypeError, match=r"^by: expected the name of a statistic or None, got int"):
        Margins(1)


@pytest.mark.filterwarnings("error")
def test_no_rows_are_no_warning():
    summary = Margins("margin").summary()
    assert summary["count"] == summary["rows"] == 0 and summary["mean"] is None
