"""Radii and distances of classes match brute force for any split into batches."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from marginops.metrics import ClassManifolds, ClassManifoldsSummary, NeuralCollapse

CLASSES, FEATURES = 4, 6


def samples(count=60, offset=0.0, dtype=torch.float64):
    """Features and targets, of which some are ignored."""
    target = torch.randint(0, CLASSES, (count,))
    target[::7] = -100
    return (torch.randn(count, FEATURES, dtype=torch.float64) + offset).to(dtype), target


def brute_force(input, target, normalize=True, classes=CLASSES):
    points = F.normalize(input.double(), dim=1) if normalize else input.double()
    groups = [points[target == index] for index in range(classes)]
    mean = torch.stack([group.mean(0) for group in groups])
    radius = [(group - group.mean(0)).square().sum(1).mean().sqrt() for group in groups]
    distance = (mean.unsqueeze(0) - mean.unsqueeze(1)).square().sum(2).sqrt()
    count = torch.tensor([len(group) for group in groups])
    return ClassManifoldsSummary(count, torch.stack(radius), distance)


def summary_of(*batches, **options):
    metric = ClassManifolds(CLASSES, FEATURES, **options)
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


def assert_close(actual, expected, tolerance=1e-12):
    for field, value in expected._asdict().items():
        torch.testing.assert_close(
            getattr(actual, field), value, rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("normalize", [True, False])
def test_matches_brute_force(dtype, normalize):
    input, target = samples(dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    actual = summary_of((input, target), normalize=normalize)
    assert_close(actual, brute_force(input, target, normalize), tolerance)
    assert actual.radius.dtype == actual.distance.dtype == torch.float64


@given(cuts=st.lists(st.integers(0, 60), max_size=5), offset=st.sampled_from([0.0, 100.0]))
@settings(max_examples=25)
def test_batches_may_be_split_anywhere(cuts, offset):
    input, target = samples(offset=offset)
    edges = [0, *sorted(cuts), 60]
    batches = [(input[a:b], target[a:b]) for a, b in itertools.pairwise(edges)]
    actual = summary_of(*batches, normalize=False)
    assert_close(actual, brute_force(input, target, normalize=False), 1e-11)


def test_radius_on_the_sphere_follows_from_the_mean():
    input, target = samples()
    metric = ClassManifolds(CLASSES, FEATURES)
    for batch in zip(input.split(13), target.split(13), strict=True):
        metric.update(*batch)
    torch.testing.assert_close(metric.compute().radius ** 2, 1 - metric.mean.square().sum(1))


def test_equal_points_have_no_radius(dtype):
    input = torch.randn(CLASSES, FEATURES).to(dtype).repeat(9, 1)
    target = torch.arange(CLASSES).repeat(9)
    assert summary_of((input, target)).radius.eq(0).all()
    batches = list(zip(input.split(5), target.split(5), strict=True))
    assert summary_of(*batches, normalize=False).radius.eq(0).all()
    # Points on the sphere round, and not in the same way in every batch.
    assert summary_of(*batches).radius.le(1e-7).all()


def test_small_radius_far_from_the_origin_keeps_its_digits():
    target = torch.arange(CLASSES).repeat(20)
    deviation = torch.randn(80, FEATURES, dtype=torch.float64) * 2.0**-20
    input = 1 + deviation.float().double()
    batches = zip(input.split(7), target.split(7), strict=True)
    expected = brute_force(input - 1, target, normalize=False)
    torch.testing.assert_close(
        summary_of(*batches, normalize=False).radius, expected.radius, rtol=1e-8, atol=0
    )


def test_orthogonal_points_are_a_diagonal_apart():
    metric = ClassManifolds(3, 3)
    metric.update(7 * torch.eye(3), torch.arange(3))
    expected = math.sqrt(2) * (1 - torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(metric.compute().distance, expected)


def test_close_means_keep_their_distance():
    metric = ClassManifolds(2, 30, normalize=False)
    step = 2.0**-40
    input = torch.ones(2, 30, dtype=torch.float64)
    input[1, 0] += step
    metric.update(input, torch.tensor([0, 1]))
    assert metric.compute().distance[0, 1] == step


def test_class_without_samples_is_nan():
    input, target = samples()
    kept = target != 2
    actual = summary_of((input[kept], target[kept]))
    expected = brute_force(input[kept], target[kept])
    assert_close(actual, expected)
    assert actual.count[2] == 0
    assert actual.radius.isnan().tolist() == [False, False, True, False]
    assert actual.distance.isnan().sum() == 2 * CLASSES - 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_class(value):
    input, target = samples()
    expected = brute_force(input, target)
    row = (target == 1).nonzero()[3]
    input[row, 0] = value
    actual = summary_of((input[:20], target[:20]), (input[20:], target[20:]))
    assert actual.radius[1].isnan()
    assert actual.distance[1].isnan().all()
    others = [0, 2, 3]
    torch.testing.assert_close(actual.radius[others], expected.radius[others])


def test_ignored_samples_may_hold_anything():
    input, target = samples()
    expected = summary_of((input, target))
    input[target == -100] = math.nan
    assert_close(summary_of((input, target)), expected, 0)
    elsewhere = torch.where(target == -100, 9, target)
    assert_close(summary_of((input, elsewhere), ignore_index=9), expected, 0)


def test_forward_returns_the_batch_and_keeps_earlier_batches():
    input, target = samples()
    metric = ClassManifolds(CLASSES, FEATURES)
    metric.update(input[:30], target[:30])
    assert_close(metric(input[30:], target[30:]), brute_force(input[30:], target[30:]))
    assert_close(metric.compute(), brute_force(input, target))


def test_state_can_be_saved_and_reset():
    input, target = samples()
    metric = ClassManifolds(CLASSES, FEATURES)
    metric.update(input[:30], target[:30])
    saved = metric.state_dict()
    kept = copy.deepcopy(saved)
    other = ClassManifolds(CLASSES, FEATURES)
    other.load_state_dict(saved)
    other.update(input[30:], target[30:])
    assert_close(other.compute(), brute_force(input, target))
    assert all(torch.equal(saved[name].nan_to_num(), kept[name].nan_to_num()) for name in kept)
    metric.reset()
    metric.update(input[30:], target[30:])
    assert_close(metric.compute(), brute_force(input[30:], target[30:]))


def test_no_gradient_is_kept():
    input, target = samples()
    metric = ClassManifolds(CLASSES, FEATURES)
    assert not metric(input.requires_grad_(), target).radius.requires_grad
    assert not metric.mean.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 6), ValueError, "num_classes: expected at least 2, got 1"),
        ((2.0, 6), TypeError, "num_classes: expected an int, got float"),
        ((4, 0), ValueError, "num_features: expected at least 1, got 0"),
        ((4, True), TypeError, "num_features: expected an int, got bool"),
    ],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        ClassManifolds(*arguments)


@pytest.mark.parametrize(
    ("input", "target", "error", "message"),
    [
        ([[1.0]], None, TypeError, "input: expected a tensor .N, 6., got list"),
        (torch.ones(3, 5), None, ValueError, r"input: expected 6 columns .*got shape \[3, 5\]"),
        (torch.ones(6), None, ValueError, r"input: expected shape \[N, 6\], got \[6\]"),
        (torch.ones(3, 6).int(), None, TypeError, "input: expected dtype .*got torch.int32"),
        (torch.ones(3, 6, device="meta"), None, ValueError, "input: expected device cpu"),
        (torch.ones(3, 6), torch.zeros(2).long(), ValueError, r"target: expected shape \[3\]"),
        (torch.ones(3, 6), torch.zeros(3), TypeError, "target: expected dtype torch.int64"),
        (torch.ones(3, 6), torch.full((3,), 4), RuntimeError, "target"),
    ],
)
def test_bad_arguments_change_nothing(input, target, error, message):
    metric = ClassManifolds(CLASSES, FEATURES)
    metric.update(*samples())
    expected = metric.compute()
    with pytest.raises(error, match=message):
        metric.update(input, torch.zeros(3, dtype=torch.int64) if target is None else target)
    assert_close(metric.compute(), expected, 0)


def test_state_keeps_its_dtype(device):
    for metric in (ClassManifolds(3, 4), NeuralCollapse(3, 4)):
        kept = {name: getattr(metric, name).dtype for name in metric._defaults}
        modules = torch.nn.ModuleDict({"metric": metric}).to(device).to(torch.bfloat16).half()
        modules["metric"].set_dtype(torch.float16)
        for name, dtype in kept.items():
            state = getattr(metric, name)
            assert state.dtype == dtype and state.device == torch.device(device), name
