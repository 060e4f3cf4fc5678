"""MarginDistribution: numpy, streams, processes, files, plots, errors."""

import copy
import importlib
import math
import pickle
import sys
import warnings

import numpy as np
import pytest
import torch

from helpers.ops import IMPLEMENTATIONS, implementation
from helpers.ranks import Ranks
from helpers.rounding import assert_same
from marginops.metrics import MarginDistribution, MarginSummary
from marginops.ops.distribution import margin_area, support_vector_counts

# The docstring bounds the error of the margin that stands for those of a bin by these.
RELATIVE, ABSOLUTE = 0.004, 1e-38
PROBABILITIES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.7, 0.95, 1.0)


def distributions(dtype):
    random = torch.randn(1001, dtype=torch.float64)
    heavy = torch.randn(1001, dtype=torch.float64) / torch.randn(1001, dtype=torch.float64)
    some = torch.rand(1001)
    cases = {
        "normal": random,
        "trained": random * 0.3 + 6,
        "heavy tails": heavy,
        "heavier tails": heavy.sign() * heavy.abs().clamp(max=1e9) ** 4,
        "tied": random.mul(2).round(),
        "equal": torch.full((77,), 0.3, dtype=torch.float64),
        "two": torch.tensor([-1.0, 3.0], dtype=torch.float64),
        "one": torch.tensor([-0.7], dtype=torch.float64),
        "negative": -random.abs() - 0.01,
        "tiny": random * 1e-30,
        "subnormal": random * 1e-40,
        "of all scales": random * 10.0 ** torch.randint(-30, 30, (1001,)),
        "ignored": torch.where(some < 0.3, torch.inf, random),
        "-inf": torch.where(some < 0.02, -torch.inf, random),
    }
    return {name: margins.to(dtype) for name, margins in cases.items()}


def assert_summary(summary, margins, exact, probabilities=PROBABILITIES, decades=3):
    values = margins.double().cpu().numpy()
    kept = np.sort(values[values != np.inf])
    count, smallest = len(kept), kept[0]
    assert summary.count.dtype == summary.ignored.dtype == torch.int64
    assert (int(summary.count), int(summary.ignored)) == (count, len(values) - count)
    assert float(summary.minimum) == smallest and float(summary.maximum) == kept[-1]
    assert float(summary.separation) == (kept > 0).mean()
    magnitude = np.abs(kept[np.isfinite(kept)]).mean()
    sum = math.fsum(kept) if np.isfinite(smallest) else smallest
    assert float(summary.mean) == pytest.approx(sum / count, rel=0, abs=1e-14 * magnitude)
    assert_same(summary.area, summary.mean)
    largest = max(kept[-1], 0.0)
    area_cdf = math.fsum(largest - np.maximum(kept, 0)) / count
    assert float(summary.area_cdf) == pytest.approx(area_cdf, rel=0, abs=1e-14 * largest + 1e-320)
    # The order statistics next to each quantile, as numpy interpolates between them.
    rank = np.array(probabilities) * (count - 1)
    lower, upper = kept[np.floor(rank).astype(int)], kept[np.ceil(rank).astype(int)]
    between = np.isfinite(lower) & np.isfinite(upper)
    quantiles = summary.quantiles.cpu().numpy()
    assert quantiles.shape == lower.shape and quantiles.dtype == np.float64
    expected = np.quantile(kept[np.isfinite(kept)], probabilities) if between.all() else None
    for i in range(len(quantiles)):
        if not between[i]:
            assert quantiles[i] == -np.inf
            continue
        share = rank[i] - np.floor(rank[i])
        exactly = lower[i] * (1 - share) + upper[i] * share if expected is None else expected[i]
        size = max(abs(lower[i]), abs(upper[i]))
        allowed = 1e-15 * size if exact else RELATIVE * size + ABSOLUTE
        assert abs(quantiles[i] - exactly) <= allowed
    thresholds = smallest + np.log(10.0) * np.arange(1, decades + 1)
    if not np.isfinite(smallest):
        assert not summary.support_vectors.any()
        return
    counts = summary.support_vectors.cpu().numpy()
    assert counts.shape == (decades,) and counts.dtype == np.int64
    allowed = np.zeros_like(thresholds) if exact else np.abs(thresholds) * RELATIVE + ABSOLUTE
    for counted, t, error in zip(counts, thresholds, allowed, strict=True):
        assert (kept < t - error).sum() <= counted <= (kept < t + error).sum()


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("exact", [False, True])
def test_summary_matches_numpy(device, dtype, exact, which):
    for name, margins in distributions(dtype).items():
        if dtype == torch.float16 and name in ("tiny", "subnormal", "heavier tails"):
            continue
        if margins.isinf().any() and name not in ("ignored", "-inf"):
            margins = margins[margins.isfinite()]
        metric = MarginDistribution(exact=exact, quantiles=PROBABILITIES).to(device)
        with implementation(which):
            for batch in margins.to(device).split(400):
                metric.update(batch)
        try:
            assert_summary(metric.compute(), margins, exact)
        except AssertionError as error:
            raise AssertionError(name) from error


def test_width_of_every_kind_of_bin():
    """The ends and the middle of some bins of every exponent and of all bins of one exponent."""
    bins = torch.cat((torch.arange(0, 0x7F80, 0x7F), torch.arange(0x3F80, 0x4000)))
    bits = (bins[:, None] << 16 | torch.tensor([0, 1, 0x7FFF, 0x8000, 0xFFFF])).int()
    margins = bits.view(torch.float32).flatten()
    margins = torch.cat((margins, -margins)).sort().values
    probabilities = np.arange(len(margins)) / (len(margins) - 1)
    metric = MarginDistribution(quantiles=probabilities)
    metric.update(margins)
    expected = margins.double().numpy()
    error = np.abs(metric.compute().quantiles.numpy() - expected)
    assert (error <= np.abs(expected) / 256 * (1 + 1e-9) + ABSOLUTE).all()
    assert (error > np.abs(expected) / 300).any()  # the bound is tight


def test_beyond_the_range_of_float32(device):
    margins = torch.tensor([-1e200, -1e-200, 1e-200, 1e100, 1e200], dtype=torch.float64)
    margins = margins.to(device)
    metric = MarginDistribution(quantiles=[0, 0.25, 0.5, 0.75, 1]).to(device)
    metric.update(margins)
    summary = metric.compute()
    assert summary.quantiles.tolist() == [-math.inf, 0, 0, math.inf, math.inf]
    assert (summary.minimum, summary.maximum) == (-1e200, 1e200)
    assert summary.separation == 0.6
    exact = MarginDistribution(exact=True, quantiles=[0, 0.25, 0.5, 0.75, 1]).to(device)
    exact.update(margins)
    assert exact.compute().quantiles.tolist() == margins.tolist()


@pytest.mark.parametrize("exact", [False, True])
def test_nan_and_no_margins_give_nan(device, exact):
    metric = MarginDistribution(exact=exact).to(device)
    metric.update(torch.tensor([], device=device))
    empty = metric.compute()
    metric.update(torch.full((3,), math.inf, device=device))
    ignored = metric.compute()
    assert (int(ignored.count), int(ignored.ignored)) == (0, 3)
    metric.update(torch.tensor([2.0, math.nan, -1.0], device=device))
    metric.update(torch.tensor([1.0], device=device))
    nan = metric.compute()
    assert (int(nan.count), int(nan.ignored)) == (4, 3)
    for summary in (empty, ignored, nan):
        assert not summary.support_vectors.any()
        for value in summary[2:-1]:
            assert value.isnan().all()
    with pytest.raises(
        ValueError, match="margins: expected finite margins for a histogram, got nan"
    ):
        metric.histogram()
    metric.reset()
    metric.update(torch.tensor([1.0], device=device))
    assert metric.compute().mean == 1


def test_summary_matches_the_functions(device):
    margins = torch.randn(500, dtype=torch.float64, device=device)
    margins[::9] = math.inf
    metric = MarginDistribution(exact=True).to(device)
    summary = metric(margins)
    torch.testing.assert_close(summary.area, margin_area(margins), rtol=1e-14, atol=1e-16)
    area_cdf = margin_area(margins, form="cdf")
    torch.testing.assert_close(summary.area_cdf, area_cdf, rtol=1e-14, atol=0)
    assert torch.equal(summary.support_vectors, support_vector_counts(margins))


@pytest.mark.parametrize("exact", [False, True])
def test_streams_merge_and_forward_returns_its_batch(device, exact):
    margins = torch.randn(900, device=device)
    margins[100:140] = math.inf
    whole, first, second = (
        MarginDistribution(exact=exact, quantiles=PROBABILITIES).to(device) for _ in range(3)
    )
    whole.update(margins)
    for metric, part in ((second, margins[300:]), (first, margins[:300])):
        for batch in part.split(128):
            assert_summary(metric(batch), batch, exact)
    first.merge_state(second)
    assert_summary(first.compute(), margins, exact)
    assert torch.equal(first.bin_counts, whole.bin_counts)
    assert_same(first.compute().quantiles, whole.compute().quantiles)
    assert_summary(second.compute(), margins[300:], exact)


@pytest.mark.parametrize("exact", [False, True])
def test_saved_state_is_a_copy_and_can_be_updated(device, exact, tmp_path):
    margins = torch.randn(400, device=device)
    metric = MarginDistribution(exact=exact).to(device)
    metric.update(margins[:100])
    torch.save(metric.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    summaries = []
    for _ in range(2):  # updating a metric does not change the loaded state
        loaded = MarginDistribution(exact=exact).to(device)
        loaded.load_state_dict(state)
        loaded.update(margins[100:])
        summaries.append(loaded.compute())
    for summary in summaries:
        assert_summary(summary, margins, exact, loaded.quantiles)
    for other in (pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric), metric.clone()):
        other.update(margins[100:])
        assert_summary(other.compute(), margins, exact, other.quantiles)
    assert_summary(metric.compute(), margins[:100], exact, metric.quantiles)
    held = sum(value.nbytes for value in metric.state_dict().values() if torch.is_tensor(value))
    assert held < 2**20


def test_conversions_of_modules_leave_the_state(device):
    metric = MarginDistribution(exact=True).to(device)
    metric.update(torch.tensor([math.pi], dtype=torch.float64, device=device))
    modules = torch.nn.ModuleDict({"metric": metric}).to(torch.bfloat16).half()
    modules["metric"].set_dtype(torch.float16)
    metric.update(torch.tensor([1.0], device=device))
    assert metric.compute().mean == (math.pi + 1) / 2
    assert metric.compute().maximum == math.pi
    assert metric.to("meta").bin_counts.is_meta


def test_results_of_one_element_keep_their_dimension():
    metric = MarginDistribution(quantiles=[0.5], decades=1)
    summary = metric(torch.tensor([1.0, 2.0, 3.0]))
    assert summary.quantiles.shape == summary.support_vectors.shape == (1,)
    assert summary.mean.shape == ()


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_inference_mode_and_gradients(device, which):
    metric = MarginDistribution().to(device)
    margins = torch.tensor([1.0, 3.0], device=device, requires_grad=True)
    with implementation(which):
        with torch.inference_mode():
            metric.update(margins * 2)
            metric.reset()
            metric.update(margins)
        metric.update(margins + 1)
        metric(margins)
    summary = metric.compute()
    assert (int(summary.count), float(summary.mean)) == (6, 14 / 6)
    assert not summary.mean.requires_grad


def results_of_rank(groups, batches):
    """The summary and histogram of a rank, computed twice, with more margins in between."""
    results = []
    for exact in (False, True):
        metric = MarginDistribution(exact=exact, quantiles=PROBABILITIES)
        for margins in batches:
            if margins is not None:
                metric.update(margins)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a rank without any margins
                results.append((*metric.compute(), *metric.histogram(7)))
    return results


def test_every_process_has_the_margins_of_all(tmp_path):
    margins = torch.randn(600, dtype=torch.float64)
    margins[::50] = math.inf
    parts = margins.split([100, 200, 150, 150])
    per_rank = [(parts[0], parts[1]), (None, parts[2]), (parts[3].float(), torch.ones(0))]
    seen = [torch.cat((parts[0], parts[3].float().double()))]
    seen.append(torch.cat((seen[0], parts[1], parts[2])))
    with Ranks(3, tmp_path) as ranks:
        answers = ranks.results(results_of_rank, per_rank)
    for results in answers:
        for result, exact, all_margins in zip(results, (0, 0, 1, 1), seen * 2, strict=True):
            assert_summary(MarginSummary(*result[:10]), all_margins, exact)
            numbers, edges = np.histogram(all_margins[all_margins.isfinite()].numpy(), 7)
            np.testing.assert_allclose(result[11].numpy(), edges, rtol=0, atol=1e-14)
            assert result[10].sum() == numbers.sum()
            if exact:
                assert result[10].tolist() == numbers.tolist()


@pytest.mark.parametrize("exact", [False, True])
def test_histogram_matches_numpy(device, exact):
    for margins in (torch.randn(5000), torch.full((9,), 2.5), torch.randn(2000) * 1e-30):
        metric = MarginDistribution(exact=exact).to(device)
        metric.update(margins.to(device))
        numbers, edges = metric.histogram(13)
        expected, expected_edges = np.histogram(margins.double().numpy(), 13)
        np.testing.assert_allclose(edges.cpu().numpy(), expected_edges, rtol=1e-12, atol=1e-45)
        assert numbers.dtype == torch.int64 and numbers.sum() == len(margins)
        if exact:
            assert numbers.tolist() == expected.tolist()
            continue
        # The count before an edge is the count before a threshold close to it.
        before, values = numbers.cumsum(0).cpu().numpy(), margins.double().numpy()
        for counted, edge in zip(before[:-1], expected_edges[1:-1], strict=True):
            error = abs(edge) * RELATIVE
            assert (values < edge - error).sum() <= counted <= (values < edge + error).sum()


@pytest.mark.parametrize("exact", [False, True])
def test_plots(exact):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    margins = torch.randn(300)
    margins[:20] = math.inf
    metric = MarginDistribution(exact=exact)
    summaries = [metric(part) for part in margins.split(100)]
    figure, ax = metric.plot()
    rank, values = ax.lines[0].get_data()
    assert ax.get_figure() is figure
    expected = np.quantile(margins[20:].numpy(), rank, method="hazen")
    assert (np.abs(values - expected) <= np.abs(expected) * 2 * RELATIVE + 1e-6).all()
    assert len(values) == (
        280 if exact else len(margins[20:].view(torch.int32).bitwise_right_shift(16).unique())
    )
    _, given = metric.plot(ax=ax, kind="histogram", bins=9)
    assert given is ax
    assert ax.patches[0].get_data().values.tolist() == metric.histogram(9)[0].tolist()
    _, steps = metric.plot(summaries)
    for line, quantile in zip(steps.lines, range(5), strict=True):
        assert line.get_ydata().tolist() == [float(s.quantiles[quantile]) for s in summaries]
    pyplot.close("all")
    with pytest.raises(ValueError, match=r"kind: expected .rank. or .histogram., got 'line'"):
        metric.plot(kind="line")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        MarginDistribution().plot()
    for name in [name for name in sys.modules if name.startswith("marginops.metrics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r'pip install "marginops\[metrics\]"'):
        importlib.import_module("marginops.metrics")


def test_wrong_arguments():
    for options, error, message in (
        ({"exact": 1}, TypeError, "exact: expected a bool, got int"),
        ({"quantiles": []}, ValueError, r"quantiles: expected probabilities in \[0, 1\], got"),
        ({"quantiles": [0.5, 1.1]}, ValueError, "quantiles: expected probabilities"),
        ({"quantiles": [math.nan]}, ValueError, "quantiles: expected probabilities"),
        ({"quantiles": 0.5}, TypeError, "quantiles: expected a sequence of floats, got 0.5"),
        ({"quantiles": ["a"]}, TypeError, "quantiles: expected a sequence of floats"),
        ({"decades": 0}, ValueError, "decades: expected at least 1, got 0"),
        ({"decades": 1.5}, TypeError, "decades: expected an int, got float"),
        ({"bins": 5}, ValueError, "bins"),
    ):
        with pytest.raises(error, match=message):
            MarginDistribution(**options)
    metric = MarginDistribution()
    with pytest.raises(ValueError, match=r"margins: expected shape \[N\], got \[2, 2\]"):
        metric.update(torch.zeros(2, 2))
    with pytest.raises(TypeError, match="margins: expected dtype"):
        metric.update(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="margins: expected device cpu as the metric, got meta"):
        metric.update(torch.zeros(2, device="meta"))
    metric.update(torch.zeros(2))
    with pytest.raises(ValueError, match="bins: expected at least 1, got 0"):
        metric.histogram(0)
    with pytest.raises(TypeError, match="bins: expected an int, got float"):
        metric.histogram(2.0)
