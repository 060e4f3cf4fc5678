"""Neural collapse with NC1 from the second pass: the same results, without a matrix D x D."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marginops.metrics import NeuralCollapse, _collapse_state

CLASSES, FEATURES = 4, 7


def samples(classes=CLASSES, features=FEATURES, count=90, spread=0.5):
    """Features in float64, targets of classes of different sizes, logits."""
    centers = 3 * torch.randn(classes, features, dtype=torch.float64) + 1
    target = (classes * torch.rand(count) ** 2).long()
    target[:classes] = torch.arange(classes)
    input = centers[target] + spread * torch.randn(count, features, dtype=torch.float64)
    return input, target, torch.randn(count, classes)


def both_passes(metric, input, target, logits, size=25, weight=None):
    batches = list(zip(input.split(size), target.split(size), logits.split(size), strict=True))
    for rows, classes, _ in batches:
        metric.update(rows, classes, weight)
    for rows, classes, values in batches:
        metric.update_nearest(rows, values, classes)
    return metric.compute()


def in_two_passes(input, target, logits, **options):
    metric = NeuralCollapse(logits.shape[1], input.shape[1], two_passes=True)
    return both_passes(metric, input, target, logits, **options)


def in_one_pass(input, target, logits, **options):
    metric = NeuralCollapse(logits.shape[1], input.shape[1])
    return both_passes(metric, input, target, logits, **options)


def assert_same(actual, expected, tolerance=1e-10):
    for name, value in expected._asdict().items():
        torch.testing.assert_close(
            getattr(actual, name),
            value,
            rtol=tolerance,
            atol=1e-13,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def exact_nc1(input, target, classes):
    """From all deviations and the pseudo-inverse, without the code of the metric."""
    means = torch.stack([input[target == index].mean(0) for index in range(classes)])
    deviation = input - means[target]
    centered = means - means.mean(0)
    between = centered.T @ centered / classes
    inverse = torch.linalg.pinv(between, rtol=1e-9, hermitian=True)
    return ((deviation @ inverse) * deviation).sum() / len(input) / classes


@given(
    classes=st.integers(2, 9),
    features=st.integers(1, 9),
    size=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_results_are_those_of_one_pass(classes, features, size, seed):
    torch.manual_seed(seed)
    data = samples(classes, features)
    weight = torch.randn(classes, features)
    expected = in_one_pass(*data, size=size, weight=weight)
    assert not any(value.isnan() for value in expected)
    assert_same(in_two_passes(*data, size=size, weight=weight), expected)


@pytest.mark.parametrize("shape", [(10, 64), (30, 8), (50, 256)], ids=str)
def test_many_samples(shape):
    data = samples(*shape, count=5000)
    actual = in_two_passes(*data, size=3000)
    assert_same(actual, in_one_pass(*data))
    torch.testing.assert_close(actual.nc1, exact_nc1(*data[:2], shape[0]), rtol=1e-10, atol=0)
    short = (data[0].float(), *data[1:])
    assert_same(in_two_passes(*short), in_one_pass(*short), 1e-6)


def test_dependent_means_are_left_out():
    means = torch.randn(5, FEATURES, dtype=torch.float64)
    means[3], means[4] = means[:3].mean(0), 2 * means[0] - means[1]
    deviation = torch.randn(5, 20, FEATURES, dtype=torch.float64)
    input = (means.unsqueeze(1) + deviation - deviation.mean(1, keepdim=True)).flatten(0, 1)
    target = torch.arange(5).repeat_interleave(20)
    logits = torch.randn(100, 5)
    actual = in_two_passes(input, target, logits)
    assert_same(actual, in_one_pass(input, target, logits))
    torch.testing.assert_close(actual.nc1, exact_nc1(input, target, 5))


def test_an_offset_adds_no_direction():
    input, target, logits = samples()
    expected = in_two_passes(input, target, logits).nc1
    # The centred means now do not quite add up to 0, which their last singular value shows.
    actual = in_two_passes(input + 1e6, target, logits).nc1
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_equal_means_give_nan():
    input = torch.randn(10, FEATURES).round().repeat(CLASSES, 1)
    target = torch.arange(CLASSES).repeat_interleave(10)
    assert in_two_passes(input, target, torch.randn(40, CLASSES), size=40).nc1.isnan()


@pytest.mark.parametrize("scale", [1e-6, 1e-9])
def test_near_full_collapse_in_float64(scale):
    # All values have few bits, so all sums are exact.
    centers = 1 + torch.randint(-8, 9, (CLASSES, FEATURES)).double()
    step = torch.randint(-9, 10, (CLASSES, 16, FEATURES)).double()
    step = 2.0 ** round(math.log2(scale)) * torch.cat((step, -step), 1)
    input = (centers.unsqueeze(1) + step).flatten(0, 1)
    target = torch.arange(CLASSES).repeat_interleave(32)
    actual = in_two_passes(input, target, torch.randn(len(input), CLASSES))
    expected = exact_nc1(input, target, CLASSES)
    assert 0 < expected < 10 * scale**2 * FEATURES * 100
    torch.testing.assert_close(actual.nc1, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_near_full_collapse_in_shorter_dtypes(dtype):
    spread = 1e-6 if dtype == torch.float32 else 1e-2
    input, target, logits = samples(count=2000, spread=spread)
    input = input.to(dtype)
    expected = exact_nc1(input.double(), target, CLASSES)
    assert 0 < expected < 1e-3
    actual = in_two_passes(input, target, logits)
    torch.testing.assert_close(actual.nc1, expected, rtol=1e-6, atol=0)
    assert_same(actual, in_one_pass(input, target, logits), 1e-6)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_scales_of_float32(scale):
    input, target, logits = samples()
    input = (input * scale).float()
    actual, expected = in_two_passes(input, target, logits), in_one_pass(input, target, logits)
    assert_same(actual, expected, 1e-6)
    assert 0 < actual.nc1 < 1


def test_an_outlier_leaves_the_range_of_float32():
    input, target, logits = samples()
    input = input.float()
    passes = NeuralCollapse(CLASSES, FEATURES, two_passes=True)
    passes.update(input, target)
    input[3] = 3e38
    passes.update_nearest(input, logits, target)
    assert math.isfinite(passes.compute().nc1) and passes.compute().nc1 > 1e70


def test_nothing_is_known_without_the_second_pass():
    input, target, logits = samples()
    metric = NeuralCollapse(CLASSES, FEATURES, two_passes=True)
    value = metric(input, target, logits[:4, :1].expand(4, FEATURES))
    assert value.nc1.isnan() and value.nc4.isnan() and not value.nc2_norm_means.isnan()
    metric.update(input, target)
    assert metric.compute().nc1.isnan() and metric.compute().nc4.isnan()
    metric.update_nearest(input[:0], logits[:0], target[:0])
    assert metric.compute().nc1.isnan() and metric.compute().nc4.isnan()
    metric.update_nearest(input, logits, target)
    assert not metric.compute().nc1.isnan()
    metric.update(input, target)
    assert metric.compute().nc1.isnan()
    metric.update_nearest(input, logits, target)
    assert_same(
        metric.compute(),
        in_two_passes(input, target, logits)._replace(
            nc2_norm_weight=metric.compute().nc2_norm_weight,
            nc2_angle_weight=metric.compute().nc2_angle_weight,
            nc3=metric.compute().nc3,
        ),
    )


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 9, 2])
def test_ignored_samples_may_hold_anything(ignore_index, two_passes):
    input, target, logits = samples(classes=3)
    ignored = torch.arange(90) % 5 == 4
    expected = in_one_pass(input[~ignored], target[~ignored], logits[~ignored])
    input[ignored], logits[ignored] = math.nan, math.nan
    target, classes = target.where(~ignored, ignore_index), 3
    if ignore_index == 2:  # a class between the others
        target, classes = torch.where(~ignored, target + (target == 2), 2), 4
        logits = torch.cat((logits[:, :2], logits[:, 2:].new_full((90, 1), -9), logits[:, 2:]), 1)
    metric = NeuralCollapse(classes, FEATURES, two_passes=two_passes, ignore_index=ignore_index)
    actual = both_passes(metric, input, target, logits)
    assert metric.compared == (~ignored).sum()
    if ignore_index == 2:
        assert actual.nc1.isnan()
    else:
        assert_same(actual, expected)


def test_a_class_without_samples_gives_nan():
    input, target, logits = samples()
    target[target == 2] = 1
    actual = in_two_passes(input.float(), target, logits)
    assert actual.nc1.isnan() and actual.nc4.isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_spreads_and_raises_nothing(dtype, value):
    input, target, logits = samples()
    input = input.to(dtype)
    spoilt = input.clone()
    spoilt[5, 2] = value
    assert in_two_passes(spoilt, target, logits).nc1.isnan()
    metric = NeuralCollapse(CLASSES, FEATURES, two_passes=True)
    metric.update(input, target)
    metric.update_nearest(spoilt, logits, target)
    assert metric.compute().nc4.isnan() and not metric.compute().nc1.isfinite()
    logits[3, 1] = math.nan
    summary = in_two_passes(input, target, logits)
    assert summary.nc4.isnan() and not summary.nc1.isnan()


def test_the_state_has_no_matrix_of_features():
    metric = NeuralCollapse(3, 500, two_passes=True)
    numbers = sum(value.numel() for value in metric.state_dict().values())
    assert numbers < 3 * 3 * 500 + 200


def test_the_pass_goes_on_after_loading_copying_and_merging():
    input, target, logits = samples()
    expected = in_one_pass(input, target, logits)
    metric = NeuralCollapse(CLASSES, FEATURES, two_passes=True)
    metric.update(input, target)
    # Other means, of which the metric must not keep anything.
    other = NeuralCollapse(CLASSES, FEATURES, two_passes=True)
    both_passes(other, input.flip(0) * 2, target, logits)
    other.load_state_dict(metric.state_dict())
    for copied in (metric, copy.deepcopy(metric), metric.clone(), other):
        copied.update_nearest(input[:30], logits[:30], target[:30])
        last = NeuralCollapse(CLASSES, FEATURES, two_passes=True)
        last.load_state_dict(copied.state_dict())
        last._update_count = 1
        for some in (copied, last):
            some.update_nearest(input[30:], logits[30:], target[30:])
            assert_same(some.compute(), expected)
    halves = [copy.deepcopy(metric) for _ in range(2)]
    for half, rows in zip(halves, (slice(0, 40), slice(40, 90)), strict=True):
        half.load_state_dict({**metric.state_dict(), "count": metric.count})
        for name in ("compared", "differing", "ratio"):
            setattr(half, name, torch.zeros_like(getattr(half, name)))
        half.update_nearest(input[rows], logits[rows], target[rows])
    halves[0].merge_state(halves[1])
    assert_same(halves[0].compute(), metric.compute())


def test_the_means_are_decomposed_once(monkeypatch):
    made = []

    class Counted(_collapse_state.SecondPass):
        def __init__(self, centers):
            made.append(centers)
            super().__init__(centers)

    monkeypatch.setattr(_collapse_state, "SecondPass", Counted)
    in_two_passes(*samples(), size=5)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            None,
            TypeError,
            r"target: expected a tensor \[N\] with two_passes=True, got NoneType; pass",
        ),
        (torch.zeros(2).long(), ValueError, "target: expected"),
        (torch.zeros(3), TypeError, "target: expected dtype torch.int64"),
        (torch.tensor([0, 4, 1]), RuntimeError, r"target: expected classes in \[0, 4\)"),
        (torch.tensor([0, -1, 1]), RuntimeError, r"target: expected classes in \[0, 4\)"),
    ],
)
def test_bad_targets_change_nothing(target, error, message):
    for two_passes in (True, False) if target is not None else (True,):
        metric = NeuralCollapse(CLASSES, FEATURES, two_passes=two_passes)
        metric.update(*samples()[:2])
        with pytest.raises(error, match=message):
            metric.update_nearest(torch.ones(3, FEATURES), torch.ones(3, CLASSES), target)
        assert not metric.has_centers and metric.compared == 0


def test_two_passes_is_a_bool():
    with pytest.raises(TypeError, match="two_passes: expected a bool, got int"):
        NeuralCollapse(CLASSES, FEATURES, two_passes=1)
