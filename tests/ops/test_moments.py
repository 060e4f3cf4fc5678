"""class_moments: brute force, other libraries, precision, NaN, reproducibility."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize as unit_rows

from helpers.ops import IMPLEMENTATIONS, implementation
from helpers.rounding import assert_same, assert_within
from helpers.strategies import LAYOUTS, dtypes, relayout
from marginops._checks import result_dtype
from marginops.ops.moments import ClassMoments, class_moments

SPECIAL = st.sampled_from([math.inf, -math.inf, math.nan, 6e4, -6e-8])


def brute_force(input, target, classes, normalize=False, ignored=-100):
    """Sums without rounding, one class and one column after another."""
    rows = [[float(value) for value in row] for row in input.double().tolist()]
    rows = [[value if math.isfinite(value) else math.nan for value in row] for row in rows]
    if normalize:
        lengths = [math.hypot(*row) for row in rows]
        rows = [
            [value / (length or 1) for value in row]
            for row, length in zip(rows, lengths, strict=True)
        ]
    count = np.zeros(classes, dtype=np.int64)
    mean, radius = np.full((classes, input.shape[1]), math.nan), np.full(classes, math.nan)
    for c in range(classes):
        own = [row for row, y in zip(rows, target.tolist(), strict=True) if y == c != ignored]
        count[c] = len(own)
        if own:
            mean[c] = [math.fsum(column) / len(own) for column in zip(*own, strict=True)]
            steps = [value - m for row in own for value, m in zip(row, mean[c], strict=True)]
            radius[c] = math.sqrt(math.fsum(step**2 for step in steps) / len(own))
    return count, mean, radius


def assert_moments(moments, expected, input, normalize=False):
    dtype = result_dtype(input.dtype)
    assert (moments.count.dtype, moments.mean.dtype, moments.radius.dtype) == (
        torch.int64,
        dtype,
        dtype,
    )
    count, mean, radius = expected
    assert moments.count.tolist() == count.tolist()
    # Rows round when they are scaled. The updates of the mean and the result round too.
    largest = max(input.double().abs().nan_to_num(0, 0, 0).flatten().tolist(), default=0.0)
    largest = 1.0 if normalize else largest
    epsilon = torch.finfo(dtype).eps
    assert_within(moments.mean, mean, 2 * epsilon, 4 * epsilon * largest, "mean")
    rounded = math.sqrt(max(input.shape[1], 1)) * epsilon if normalize else 0
    assert_within(moments.radius, radius, 16 * epsilon, 2 * rounded, "radius")


@st.composite
def moments_cases(draw):
    """Input, target and the number of classes."""
    rows, columns = draw(st.integers(0, 30)), draw(st.sampled_from([0, 1, 3, 16, 17, 37, 70]))
    classes = draw(st.integers(1, 6))
    # A seed gives most values: thousands of drawn numbers would only slow the search down.
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size, offset = draw(st.sampled_from([(1.0, 0.0), (100.0, 3.0), (0.01, 5.0)]))
    dense = torch.randn(rows, columns, generator=random, dtype=torch.float64) * size + offset
    if rows and columns:
        row, column = st.integers(0, rows - 1), st.integers(0, columns - 1)
        for place in draw(st.lists(st.tuples(row, column, SPECIAL), max_size=3)):
            dense[place[0], place[1]] = place[2]
        dense[draw(st.lists(row, max_size=2))] = 0
    labels = st.integers(0, classes - 1) | st.just(-100)
    target = torch.tensor(draw(st.lists(labels, min_size=rows, max_size=rows)), dtype=torch.int64)
    return relayout(dense.to(draw(dtypes)), draw(st.sampled_from(LAYOUTS))), target, classes


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=moments_cases(), normalize=st.booleans())
def test_moments_match_brute_force(device, which, case, normalize):
    input, target, classes = case
    with implementation(which):
        moments = class_moments(input.to(device), target.to(device), classes, normalize=normalize)
    assert_moments(moments, brute_force(input, target, classes, normalize), input, normalize)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rows", [255, 256, 257, 511, 1030])
def test_classes_of_every_number_of_pieces(device, dtype, which, normalize, rows):
    input = torch.randn(rows + 300, 21).to(dtype) + 2
    target = torch.cat((torch.full((rows,), 3), torch.randint(3, (300,))))
    mixed = torch.randperm(rows + 300)
    input, target = input[mixed], target[mixed]
    with implementation(which):
        moments = class_moments(input.to(device), target.to(device), 5, normalize=normalize)
    expected = brute_force(input, target, 5, normalize)
    assert moments.count[3] == rows and moments.count[4] == 0
    assert_moments(moments, expected, input, normalize)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_moments_match_sklearn_and_numpy(device, which):
    input, target = torch.randn(900, 12).double() + 1, torch.randint(4, (900,))
    for normalize in (False, True):
        rows = unit_rows(input.numpy()) if normalize else input.numpy()
        with implementation(which):
            moments = class_moments(input.to(device), target.to(device), 4, normalize=normalize)
        centroids = NearestCentroid().fit(rows, target.numpy()).centroids_
        assert_within(moments.mean, centroids, 1e-13, 1e-14)
        spread = [np.trace(np.cov(rows[target.numpy() == c].T, ddof=0)) for c in range(4)]
        assert_within(moments.radius, np.sqrt(spread), 1e-13, 0)
        if normalize:
            identity = 1 - moments.mean.square().sum(1)
            torch.testing.assert_close(moments.radius.square(), identity)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("dtype", "offset", "spread"),
    [(torch.float32, 1e4, 1e-3), (torch.float32, -3e3, 0.1), (torch.float64, 1e12, 1e-4)],
)
def test_radius_does_not_cancel(device, which, dtype, offset, spread):
    """The samples lie a few units in the last place around a point far from 0."""
    input = (torch.randn(3000, 19).double() * spread + offset).to(dtype)
    target = torch.arange(3000) % 4
    target[:600] = 3
    with implementation(which):
        moments = class_moments(input.to(device), target.to(device), 4)
    # Differences from a sample are exact, so nothing cancels in the float64 reference either.
    shifted = input.double() - input[0].double()
    _, mean, radius = brute_force(shifted, target, 4)
    assert radius.max() < 10 * spread * math.sqrt(19)
    epsilon = torch.finfo(dtype).eps
    assert_within(moments.radius, radius, 16 * epsilon, 0)
    assert_within(moments.mean, mean + input[0].double().numpy(), epsilon, 0)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("columns", [1, 16, 83])
def test_equal_rows_have_radius_zero(device, dtype, which, normalize, columns):
    sizes = [1, 2, 7, 256, 257, 259, 770]
    rows = torch.randn(len(sizes), columns).to(dtype)
    target = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    target = target[torch.randperm(len(target))]
    with implementation(which):
        moments = class_moments(
            rows[target].to(device), target.to(device), len(sizes), normalize=normalize
        )
    assert moments.radius.tolist() == [0] * len(sizes)
    assert moments.count.tolist() == sizes
    if not normalize:
        assert torch.equal(moments.mean.cpu(), rows.to(moments.mean.dtype))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-18, 1e18, 1e30])
def test_spread_of_any_size(device, which, size):
    """In float32 the squares of all of these over- or underflow."""
    input = (torch.randn(600, 10).double() * size).float()
    input[300:] += 0.5 * size
    target = torch.arange(600) // 300
    with implementation(which):
        moments = class_moments(input.to(device), target.to(device), 2)
    expected = brute_force(input.double() / size, target, 2)
    scaled = ClassMoments(moments.count, *(value.double() / size for value in moments[1:]))
    assert_within(scaled.radius, expected[2], 1e-5, 1e-45 / size)
    assert_within(scaled.mean, expected[1], 1e-6, 1e-6 + 1e-45 / size)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_rows_of_any_length_become_unit_rows(device, which, wide):
    limits = torch.finfo(wide)
    direction = torch.randn(300, 20, dtype=torch.float64)
    ends = math.log10(limits.tiny) + 2, math.log10(limits.max) - 2
    length = torch.logspace(*ends, 300, dtype=torch.float64)
    input = (direction * length.unsqueeze(1)).to(wide)
    target = torch.zeros(300, dtype=torch.int64)
    input[7], target[7] = 0, 1
    input[8], target[8] = limits.smallest_normal * limits.eps, 2
    with implementation(which):
        moments = class_moments(input.to(device), target.to(device), 3, normalize=True)
    expected = class_moments(
        direction[target == 0].to(wide).to(device),
        target[target == 0].to(device),
        1,
        normalize=True,
    )
    torch.testing.assert_close(moments.mean[:1], expected.mean)
    torch.testing.assert_close(moments.radius[:1], expected.radius)
    assert not moments.mean[1].any() and moments.radius[1] == 0
    torch.testing.assert_close(moments.mean[2], torch.full_like(moments.mean[2], 20**-0.5))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [[0], [5], [0, 40], [299], [0, 299]])
def test_nan_and_infinity_reach_their_class_only(device, dtype, which, value, rows):
    input, target = torch.randn(600, 21).to(dtype), torch.arange(600) // 300
    target[:1] = 2
    input[rows, 3] = value
    reached = sorted({int(c) for c in target[rows]})
    for normalize in (False, True):
        with implementation(which):
            moments = class_moments(input.to(device), target.to(device), 3, normalize=normalize)
        assert moments.radius.isnan().nonzero().flatten().tolist() == reached
        nan = torch.zeros(3, 21, dtype=torch.bool)
        nan[reached, slice(None) if normalize else slice(3, 4)] = True
        assert torch.equal(moments.mean.isnan().cpu(), nan)
        assert moments.mean[~nan.to(device)].isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("columns", [5, 64, 129])
def test_bits_do_not_depend_on_threads_layouts_or_other_classes(dtype, normalize, columns):
    input, target = torch.randn(5000, columns).to(dtype) * 3 + 1, torch.randint(7, (5000,))
    target[:2000] = 2
    torch.set_num_threads(1)
    expected = class_moments(input, target, 7, normalize=normalize)
    torch.set_num_threads(2)
    order = target.argsort(stable=True)
    for rows, labels in (
        (input, target),
        (input[order], target[order]),
        *((relayout(input, layout), target) for layout in LAYOUTS),
    ):
        for one, other in zip(
            class_moments(rows, labels, 7, normalize=normalize), expected, strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_rows_and_targets_without_strides(device, dtype, which):
    row, target = torch.randn(1, 9).to(device, dtype), torch.tensor([1], device=device)
    with implementation(which):
        moments = class_moments(row.expand(300, -1), target.expand(300), 2)
        many = class_moments(row.repeat(300, 1), target.repeat(300), 2)
        spread = torch.stack((target.repeat(300), target.new_zeros(300)), 1)[:, 0]
        strided = class_moments(row.repeat(300, 1), spread, 2)
    for one, two, three in zip(moments, many, strided, strict=True):
        assert_same(one, two)
        assert_same(three, two)


def test_moments_print_in_one_line_without_values():
    moments = class_moments(torch.randn(90, 40), torch.arange(90) % 30, 30)
    expected = "ClassMoments(count=int64[30], mean=float32[30, 40], radius=float32[30], device=cpu)"
    assert repr(moments) == expected
