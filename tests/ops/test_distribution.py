"""Areas under the curve of margins, support vectors, and the op of margin distributions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from helpers.ops import IMPLEMENTATIONS, implementation, opcheck
from helpers.strategies import anything, dtypes, finite
from marginops.ops.distribution import (
    BINS,
    margin_area,
    support_vector_counts,
    update_margin_distribution_op,
)

FORMS = ["rank", "cdf"]


def vectors(elements):
    """Margins in every dtype, contiguous or strided."""

    def build(values, dtype, stride):
        dense = torch.tensor(values, dtype=torch.float64).to(dtype)
        spread = torch.full((len(values) * stride,), torch.nan, dtype=dtype)[::stride]
        return spread.copy_(dense)

    lists = st.lists(elements, max_size=70)
    return st.builds(build, lists, dtypes, st.sampled_from([1, 1, 3]))


def area_by_scipy(margins, form):
    """The area below the steps of the quantile function, or of the distribution function."""
    kept = margins[margins != math.inf]
    if len(kept) == 0:
        return math.nan
    if form == "rank":
        distribution = scipy.stats.ecdf(kept).cdf
        return float(
            np.sum(distribution.quantiles * np.diff(distribution.probabilities, prepend=0))
        )
    largest = max(kept.max(), 0.0)
    edges = np.unique(np.concatenate(([0.0, largest], kept[(kept > 0) & (kept < largest)])))
    heights = scipy.stats.ecdf(kept).cdf.evaluate(edges[:-1])
    return float(np.sum(heights * np.diff(edges)))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(margins=vectors(finite | st.just(math.inf)))
def test_area_matches_scipy(device, form, margins):
    area = margin_area(margins.to(device), form=form)
    expected = area_by_scipy(margins.double().numpy(), form)
    assert area.shape == ()
    assert area.dtype == torch.promote_types(margins.dtype, torch.float32)
    epsilon = torch.finfo(area.dtype).eps
    np.testing.assert_allclose(float(area), expected, rtol=epsilon, atol=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_area_of_nonfinite_margins(device, form):
    def area(*values):
        return float(margin_area(torch.tensor(values, device=device), form=form))

    assert math.isnan(area()) and math.isnan(area(math.inf))
    assert math.isnan(area(1, math.nan)) and math.isnan(area(math.inf, -math.nan))
    assert area(-math.inf, 2, math.inf) == (-math.inf if form == "rank" else 1)
    assert area(-3, -1, math.inf) == (-2 if form == "rank" else 0)


def test_area_does_not_lose_what_float32_would(device):
    margins = torch.full((2**21,), 16777217.0, dtype=torch.float64).float()
    margins[0] = -1e9
    expected = margins.double().mean().item()
    assert float(margin_area(margins.to(device))) == pytest.approx(expected, rel=1e-7)


def exact_area(margins, form):
    """The area in rational numbers."""
    numbers = [Fraction(margin) for margin in margins.double().tolist()]
    largest = max(*numbers, Fraction(0))
    terms = numbers if form == "rank" else [largest - max(q, 0) for q in numbers]
    return float(sum(terms) / len(terms))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shares", [(1, 1, 0), (1, 1, 1, 1), (-1, -1), (1, -1), (1, 0.25, -0.5)])
def test_area_near_the_largest_and_the_smallest_number(device, form, dtype, shares):
    limits = torch.finfo(dtype)
    for size in (limits.max, 511.5, limits.smallest_normal):
        margins = torch.tensor([share * size for share in shares], dtype=torch.float64)
        margins = torch.cat((margins.to(dtype), torch.tensor([math.inf], dtype=dtype)))
        area = margin_area(margins.to(device), form=form)
        assert area.dtype == torch.promote_types(dtype, torch.float32)
        expected = exact_area(margins[:-1], form)
        assert float(area) == pytest.approx(expected, rel=2 * torch.finfo(area.dtype).eps, abs=0)


def test_area_of_the_distribution_function_subtracts_in_float32_or_better(device):
    margins = torch.tensor([512.0, 1.0, 3.0], dtype=torch.bfloat16, device=device)
    assert float(margin_area(margins, form="cdf")) == pytest.approx((511 + 509) / 3, rel=1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_area_has_first_and_second_derivatives(device, form):
    margins = torch.randn(9, dtype=torch.float64, device=device)
    margins[4] = math.inf
    finite = margins.isfinite()
    inputs = (margins[finite].requires_grad_(),)

    def area(values):
        return margin_area(margins.masked_scatter(finite, values), form=form)

    assert gradcheck(area, inputs)
    assert gradgradcheck(lambda values: area(values).exp(), inputs)
    margins.requires_grad_()
    margin_area(margins, form=form).backward()
    assert margins.grad.isfinite().all() and margins.grad[4] == 0


@pytest.mark.parametrize("decades", [1, 3, 5])
@settings(max_examples=40)
@given(margins=vectors(anything))
def test_support_vectors_by_brute_force(device, decades, margins):
    counts = support_vector_counts(margins.to(device), decades)
    values = margins.tolist()
    smallest = math.nan if any(map(math.isnan, values)) else min(values, default=math.nan)
    thresholds = [smallest + k * math.log(10) for k in range(1, decades + 1)]
    expected = [sum(value < t for value in values) for t in thresholds]
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected


def test_support_vectors_have_the_largest_losses(device):
    """Samples whose loss exp(-q) is above a 10th, 100th, 1000th of the largest."""
    margins = torch.randn(5000, dtype=torch.float64, device=device) * 4
    loss = (-margins).exp()
    expected = [(loss > loss.max() / 10**k).sum().item() for k in (1, 2, 3)]
    assert support_vector_counts(margins).tolist() == expected
    assert 0 < expected[0] < expected[2] < 5000


def test_functions_compile_without_a_graph_break(device):
    counter = CompileCounterWithBackend("aot_eager")

    def both(margins):
        return margin_area(margins, form="cdf"), support_vector_counts(margins, 2)

    margins = torch.randn(30, device=device)
    area, counts = torch.compile(both, backend=counter, fullgraph=True)(margins)
    assert counter.frame_count == 1
    torch.testing.assert_close(area, margin_area(margins, form="cdf"))
    assert torch.equal(counts, support_vector_counts(margins, 2))


@pytest.mark.parametrize("function", [margin_area, support_vector_counts])
def test_wrong_margins(function):
    with pytest.raises(TypeError, match=r"margins: expected a tensor \[N\], got list"):
        function([1.0])
    with pytest.raises(TypeError, match=r"margins: expected dtype .*, got torch.int64"):
        function(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"margins: expected shape \[N\], got \[2, 3\]"):
        function(torch.zeros(2, 3))


def test_wrong_options():
    margins = torch.zeros(3)
    with pytest.raises(ValueError, match=r"form: expected .rank. or .cdf., got 'auc'"):
        margin_area(margins, form="auc")
    with pytest.raises(ValueError, match="decades: expected at least 1, got 0"):
        support_vector_counts(margins, 0)
    for decades in (2.0, True, None):
        with pytest.raises(TypeError, match="decades: expected an int, got"):
            support_vector_counts(margins, decades)


def new_state(device):
    return (
        torch.zeros(BINS, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.float64, device=device),
        torch.tensor(math.inf, dtype=torch.float64, device=device),
        torch.tensor(-math.inf, dtype=torch.float64, device=device),
    )


def state_by_brute_force(values):
    """Nonempty bins, counts, sums and extremes, computed with Python floats."""
    kept = [value for value in values if value != math.inf]
    with np.errstate(over="ignore"):
        bits = np.array(kept, dtype=np.float64).astype(np.float32).view(np.uint32)
    numbers, times = np.unique(bits >> 16, return_counts=True)
    bins = dict(zip(numbers.tolist(), times.tolist(), strict=True))
    has_nan = any(map(math.isnan, kept))
    sums = [math.nan if has_nan else math.fsum(kept)] if -math.inf not in kept else [-math.inf]
    sums = [math.nan] if has_nan else sums
    sums.append(math.nan if has_nan else math.fsum(max(value, 0.0) for value in kept))
    return (
        bins,
        [len(values) - len(kept), sum(value > 0 for value in kept)],
        sums,
        math.nan if has_nan else min(kept, default=math.inf),
        math.nan if has_nan else max(kept, default=-math.inf),
    )


def assert_state(state, values):
    bins, counts, sums, minimum, maximum = state_by_brute_force(values)
    actual = {bin: int(state[0][bin]) for bin in state[0].nonzero().flatten().tolist()}
    if not math.isnan(minimum):  # which bin a NaN is in depends on its bits
        assert actual == bins
    assert sum(actual.values()) == len(values) - counts[0]
    assert state[1].tolist() == counts
    magnitude = sum(abs(value) for value in values if math.isfinite(value))
    for result, expected in zip(state[2].tolist(), sums, strict=True):
        assert result == pytest.approx(expected, rel=0, abs=1e-15 * magnitude, nan_ok=True)
    for result, expected in zip(state[3:], (minimum, maximum), strict=True):
        assert result.item() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@settings(max_examples=40)
@given(batches=st.lists(vectors(anything), max_size=3))
def test_state_matches_brute_force(device, which, batches):
    state = new_state(device)
    with implementation(which):
        for margins in batches:
            assert update_margin_distribution_op(*state, margins.to(device)) is None
    assert_state(state, [value for margins in batches for value in margins.tolist()])


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1, 17, 1023, 1025, 140_001])
def test_state_of_many_margins(device, dtype, which, size):
    """Sizes at the ends of vectors, tiles, chunks and threads; some margins are 0 in float32."""
    scale = 10.0 ** torch.randint(-45, 38, (size,))
    scale[: size // 2] = 1
    margins = (torch.randn(size, dtype=torch.float64) * scale).to(dtype)
    margins[::7] = math.inf
    margins[5::11] = 0
    margins[6::13] = -0.0
    values = margins.tolist()
    for spread in (margins, margins.repeat_interleave(2)[::2]):
        state = new_state(device)
        with implementation(which):
            update_margin_distribution_op(*state, spread.to(device))
        assert_state(state, values)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [3, 140_000])
def test_nan_of_any_bits_makes_the_state_nan(device, which, size):
    for bits in (0x7F800001, 0x7FC00000, -0x007FFFFF, -1):
        margins = torch.ones(size)
        margins.view(torch.int32)[size - 2] = bits
        state = new_state(device)
        with implementation(which):
            update_margin_distribution_op(*state, margins.to(device))
            update_margin_distribution_op(*state, torch.zeros(5, device=device))
        assert state[3].isnan() and state[4].isnan() and state[2].isnan().all()
        assert state[1].tolist() == [0, size - 1]


def test_threads_do_not_change_a_bit(device):
    margins = torch.randn(300_001, device=device)
    states = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        states.append(new_state(device))
        update_margin_distribution_op(*states[-1], margins)
    for state in states[1:]:
        assert all(map(torch.equal, state, states[0]))


def test_opcheck(device):
    margins = torch.randn(40, device=device)
    opcheck("update_margin_distribution", *new_state(device), margins)

    def update(*arguments):
        update_margin_distribution_op(*arguments)
        return arguments[1] * 2

    counter = CompileCounterWithBackend("aot_eager")
    state = new_state(device)
    doubled = torch.compile(update, backend=counter, fullgraph=True)(*state, margins)
    assert counter.frame_count == 1
    assert_state(state, margins.tolist())
    assert torch.equal(doubled, state[1] * 2)


def test_native_kernel_checks_its_state():
    bin_counts, *others = new_state("cpu")
    update = torch.ops.marginops.update_margin_distribution
    update(bin_counts, *others, torch.ones(1))  # loads the native kernel, if there is a compiler
    with pytest.raises((RuntimeError, IndexError)):
        update(bin_counts[:10], *others, torch.ones(1))
    with pytest.raises(RuntimeError):
        update(bin_counts, *others, torch.ones(1, dtype=torch.int64).view(1, 1))
