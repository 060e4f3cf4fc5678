"""Neural collapse: closed forms, brute force, scikit-learn."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marginops.metrics import NeuralCollapse, NeuralCollapseSummary

CLASSES, FEATURES = 4, 7
BY_MEANS = {"nc1", "nc2_norm_means", "nc2_angle_means", "nc3", "nc4"}
BY_WEIGHT = {"nc2_norm_weight", "nc2_angle_weight", "nc3"}


def samples(count=80, classes=CLASSES, features=FEATURES, spread=0.5):
    """Features in float64 around the class means, targets and a weight."""
    centers = torch.randn(classes, features, dtype=torch.float64)
    target = torch.randint(0, classes, (count,))
    target[:classes] = torch.arange(classes)
    input = centers[target] + spread * torch.randn(count, features, dtype=torch.float64) + 3
    return input, target, torch.randn(classes, features, dtype=torch.float64)


def simplex(classes=CLASSES, features=FEATURES):
    """Equiangular rows in a random orientation."""
    basis = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64)).Q[:classes]
    return 5 * (basis - basis.mean(0))


def brute_force(input, target, weight, logits):
    """The metrics from D x D matrices, sample by sample."""
    classes = int(target.max()) + 1
    means = torch.stack([input[target == index].mean(0) for index in range(classes)])
    centered = means - means.mean(0)
    deviation = input - means[target]
    within = sum(torch.outer(row, row) for row in deviation) / len(input)
    between = sum(torch.outer(row, row) for row in centered) / classes
    rank = min(classes - 1, input.shape[1])
    assert torch.linalg.matrix_rank(between, rtol=1e-9) == rank
    inverse = torch.linalg.pinv(between, rtol=1e-9, hermitian=True)

    def angles(rows):
        pairs = [(a, b) for a in range(classes) for b in range(classes) if a != b]
        similarity = torch.nn.functional.cosine_similarity
        return torch.stack(
            [(similarity(rows[a], rows[b], dim=0) + 1 / (classes - 1)).abs() for a, b in pairs]
        ).mean()

    def norms(rows):
        norm = rows.norm(dim=1)
        return norm.std(correction=0) / norm.mean()

    nearest = (input.unsqueeze(1) - means).norm(dim=2).argmin(1)
    return NeuralCollapseSummary(
        torch.trace(within @ inverse) / classes,
        norms(centered),
        angles(centered),
        norms(weight),
        angles(weight),
        (weight.T / weight.norm() - centered.T / centered.norm()).norm() ** 2,
        (logits.argmax(1) != nearest).double().mean(),
    )


def summary_of(*batches, weight=None, nearest=(), sizes=(CLASSES, FEATURES), **options):
    metric = NeuralCollapse(*sizes, **options)
    for batch in batches:
        metric.update(*batch, weight)
    for batch in nearest:
        metric.update_nearest(*batch)
    return metric.compute()


def assert_close(actual, expected, tolerance=1e-10):
    for field, value in expected._asdict().items():
        torch.testing.assert_close(
            getattr(actual, field),
            value,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, field=field: f"{field}: {text}",
        )


def missing(summary):
    return {field for field, value in summary._asdict().items() if value.isnan()}


@pytest.mark.parametrize("classes, features", [(4, 7), (2, 5), (6, 3), (8, 7), (3, 1)])
def test_matches_brute_force(classes, features):
    input, target, weight = samples(classes=classes, features=features)
    logits = torch.randn(len(input), classes, dtype=torch.float64)
    actual = summary_of(
        *zip(input.split(33), target.split(33), strict=True),
        weight=weight,
        nearest=zip(input.split(20), logits.split(20), strict=True),
        sizes=(classes, features),
    )
    assert_close(actual, brute_force(input, target, weight, logits))
    assert all(value.dtype == torch.float64 and value.dim() == 0 for value in actual)


def test_matches_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.neighbors import NearestCentroid

    input, target, weight = samples(spread=2.0)
    logits = input @ weight.T
    actual = summary_of((input, target), nearest=[(input, logits)])
    centroids = NearestCentroid().fit(input.numpy(), target.numpy())
    nearest = torch.from_numpy(centroids.predict(input.numpy()))
    assert actual.nc4 == (logits.argmax(1) != nearest).double().mean()
    assert 0 < actual.nc4 < 1
    analysis = LinearDiscriminantAnalysis(store_covariance=True).fit(input.numpy(), target.numpy())
    within = torch.from_numpy(analysis.covariance_)
    means = torch.from_numpy(analysis.means_)
    inverse = torch.linalg.pinv(torch.cov(means.T, correction=0), rtol=1e-9, hermitian=True)
    torch.testing.assert_close(actual.nc1, torch.trace(within @ inverse) / CLASSES)


def test_simplex_has_collapsed(dtype):
    means = simplex()
    target = torch.arange(CLASSES).repeat(5)
    input = (means + 2)[target].to(dtype)
    logits = (input.double() - 2) @ means.T
    actual = summary_of((input, target), weight=0.1 * means, nearest=[(input, logits)])
    tolerance = 1e-13 if dtype == torch.float64 else 10 * torch.finfo(dtype).eps
    for field, value in actual._asdict().items():
        assert value.abs() < tolerance, field


def test_frames_have_closed_forms():
    identity = torch.eye(CLASSES, FEATURES, dtype=torch.float64)
    norms = torch.arange(1.0, CLASSES + 1, dtype=torch.float64).unsqueeze(1)
    target = torch.arange(CLASSES)
    actual = summary_of((identity, target), weight=norms * identity)
    # Centred orthogonal rows are a simplex. As they are, their cosines are 0.
    assert actual.nc2_norm_means < 1e-15
    assert actual.nc2_angle_means < 1e-15
    torch.testing.assert_close(actual.nc2_angle_weight.item(), 1 / (CLASSES - 1))
    expected = math.sqrt((CLASSES**2 - 1) / 12) / ((CLASSES + 1) / 2)
    torch.testing.assert_close(actual.nc2_norm_weight.item(), expected)
    opposite = summary_of((identity, target), weight=identity.mean(0) - identity)
    torch.testing.assert_close(opposite.nc3.item(), 4.0)
    orthogonal = torch.eye(FEATURES, dtype=torch.float64)[-CLASSES:].roll(1, 0)
    orthogonal[:, :CLASSES] = 0
    torch.testing.assert_close(summary_of((identity, target), weight=orthogonal).nc3.item(), 2.0)


def test_rigid_motions_and_scales_change_nothing():
    input, target, weight = samples()
    logits = torch.randn(len(input), CLASSES, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(FEATURES, FEATURES, dtype=torch.float64)).Q
    moved = 1e3 * (input @ rotation) + 50
    assert_close(
        summary_of((moved, target), weight=weight @ rotation, nearest=[(moved, logits)]),
        summary_of((input, target), weight=1e-3 * weight, nearest=[(input, logits)]),
        1e-9,
    )


def test_an_offset_adds_no_direction():
    input, target, _ = samples()
    expected = summary_of((input, target)).nc1
    # The centred means now do not quite add up to 0, which their last singular value shows.
    actual = summary_of((input + 1e6, target)).nc1
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_dependent_means_are_left_out():
    means = torch.randn(CLASSES, FEATURES, dtype=torch.float64)
    means[3] = means[:3].mean(0)
    deviation = torch.randn(CLASSES, 10, FEATURES, dtype=torch.float64)
    input = means.unsqueeze(1) + deviation - deviation.mean(1, keepdim=True)
    target = torch.arange(CLASSES).repeat_interleave(10)
    actual = summary_of((input.flatten(0, 1), target)).nc1
    centered = means - means.mean(0)
    within = torch.cov((input - means.unsqueeze(1)).flatten(0, 1).T, correction=0)
    inverse = torch.linalg.pinv(centered.T @ centered / CLASSES, rtol=1e-9, hermitian=True)
    torch.testing.assert_close(actual, torch.trace(within @ inverse) / CLASSES)


def test_equal_means_give_nan():
    input = torch.randn(10, FEATURES, dtype=torch.float64).round()
    actual = summary_of((input.repeat(CLASSES, 1), torch.arange(CLASSES).repeat_interleave(10)))
    assert {"nc1", "nc2_norm_means", "nc2_angle_means", "nc3"} <= missing(actual)


@given(cuts=st.lists(st.integers(0, 80), max_size=4))
@settings(max_examples=15)
def test_batches_may_be_split_anywhere(cuts):
    input, target, weight = samples()
    logits = torch.randn(80, CLASSES)
    edges = [0, *sorted(cuts), 80]
    pieces = [slice(*edge) for edge in itertools.pairwise(edges)]
    actual = summary_of(
        *((input[piece], target[piece]) for piece in pieces),
        weight=weight,
        nearest=[(input[piece], logits[piece]) for piece in pieces],
    )
    assert_close(actual, brute_force(input, target, weight, logits))


def test_small_variability_far_from_the_origin_keeps_its_digits():
    input, target, _ = samples()
    centers = torch.randn(CLASSES, FEATURES, dtype=torch.float64).float().double()
    deviation = (2.0**-20 * input).float().double()
    batches = (centers[target] + deviation).split(9), target.split(9)
    actual = summary_of(*zip(*batches, strict=True)).nc1
    mean = torch.stack([deviation[target == index].mean(0) for index in range(CLASSES)])
    variance = torch.cov((deviation - mean[target]).T, correction=0)
    centered = (centers + mean) - (centers + mean).mean(0)
    inverse = torch.linalg.pinv(centered.T @ centered / CLASSES, rtol=1e-9, hermitian=True)
    torch.testing.assert_close(actual, torch.trace(variance @ inverse) / CLASSES, rtol=1e-8, atol=0)


def test_missing_inputs_give_nan():
    input, target, weight = samples()
    assert missing(summary_of((input, target))) == BY_WEIGHT | {"nc4"}
    assert missing(summary_of((input, target), weight=weight)) == {"nc4"}
    seen = target != 2
    logits = torch.randn(len(input), CLASSES)
    assert (
        missing(summary_of((input[seen], target[seen]), weight=weight, nearest=[(input, logits)]))
        == BY_MEANS
    )


def test_nan_spreads_and_raises_nothing():
    input, target, weight = samples()
    logits = torch.randn(len(input), CLASSES)
    spoilt = input.clone()
    for value in (math.nan, math.inf):
        spoilt[5, 2] = value
        summary = summary_of((spoilt, target), weight=weight, nearest=[(input, logits)])
        assert missing(summary) == BY_MEANS
        summary = summary_of((input, target), weight=weight, nearest=[(spoilt, logits)])
        assert missing(summary) == {"nc4"}
    logits[3, 1] = math.nan
    summary = summary_of((input, target), weight=weight, nearest=[(input, logits)])
    assert missing(summary) == {"nc4"}
    weight[0, 0] = math.nan
    assert missing(summary_of((input, target), weight=weight)) == BY_WEIGHT | {"nc4"}


def test_ignored_samples_may_hold_anything():
    input, target, weight = samples()
    ignored = torch.arange(80) % 5 == 4
    expected = summary_of((input[~ignored], target[~ignored]), weight=weight)
    input[ignored] = math.nan
    assert_close(summary_of((input, target.where(~ignored, -100)), weight=weight), expected)
    actual = summary_of((input, target.where(~ignored, 9)), weight=weight, ignore_index=9)
    assert_close(actual, expected)


def test_the_last_weight_counts():
    input, target, weight = samples()
    metric = NeuralCollapse(CLASSES, FEATURES)
    metric.update(input[:40], target[:40], -weight)
    metric.update(input[40:], target[40:], weight)
    metric.update(input[:0], target[:0])
    weight *= 2
    assert_close(metric.compute(), summary_of((input, target), weight=weight), 1e-12)


def test_ties_go_to_the_lowest_class():
    metric = NeuralCollapse(2, 1)
    metric.update(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    metric.update_nearest(torch.zeros(3, 1), torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]))
    torch.testing.assert_close(metric.compute().nc4.item(), 1 / 3)


def test_more_samples_restart_the_second_pass():
    input, target, weight = samples()
    logits = torch.randn(80, CLASSES)
    metric = NeuralCollapse(CLASSES, FEATURES)
    metric.update(input[:40], target[:40], weight)
    metric.update_nearest(input[:40], logits[:40])
    assert metric.compute().nc4 >= 0
    metric.update(input[40:], target[40:])
    assert metric.compute().nc4.isnan()
    for rows in (slice(0, 0), slice(0, 80)):
        metric.update_nearest(input[rows], logits[rows])
    assert_close(metric.compute(), brute_force(input, target, weight, logits))


def test_forward_returns_the_batch_and_keeps_earlier_batches():
    input, target, weight = samples()
    metric = NeuralCollapse(CLASSES, FEATURES)
    metric.update(input[:30], target[:30])
    first = metric(input[30:], target[30:], weight)
    assert_close(first, summary_of((input[30:], target[30:]), weight=weight))
    assert_close(metric.compute(), summary_of((input, target), weight=weight))


def test_state_can_be_saved_between_and_within_the_passes():
    input, target, weight = samples()
    logits = torch.randn(80, CLASSES)
    metric = NeuralCollapse(CLASSES, FEATURES)
    metric.update(input, target, weight)
    metric.update_nearest(input[:30], logits[:30])
    saved = metric.state_dict()
    kept = copy.deepcopy(saved)
    other = NeuralCollapse(CLASSES, FEATURES)
    other.load_state_dict(saved)
    other.update_nearest(input[30:], logits[30:])
    expected = brute_force(input, target, weight, logits)
    with pytest.warns(UserWarning, match="was called before the ``update``"):
        assert_close(other.compute(), expected)
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    metric.reset()
    assert not metric.has_centers
    metric.update(input, target, weight)
    assert metric.compute().nc4.isnan()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 6), ValueError, "num_classes: expected at least 2, got 1"),
        ((4, 0), ValueError, "num_features: expected at least 1, got 0"),
        ((4, 2.0), TypeError, "num_features: expected an int, got float"),
    ],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        NeuralCollapse(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.ones(3, 5)}, ValueError, "input: expected 7 columns"),
        ({"input": torch.ones(3, 7, device="meta")}, ValueError, "input: expected device cpu"),
        ({"target": torch.ones(3)}, TypeError, "target: expected dtype torch.int64"),
        ({"target": torch.full((3,), 4)}, RuntimeError, "target"),
        ({"weight": torch.ones(3, 7)}, ValueError, r"weight: expected shape \[4, 7\]"),
        ({"weight": torch.ones(4, 6)}, ValueError, "weight: expected 7 columns"),
        ({"weight": [1.0]}, TypeError, "weight: expected a tensor"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, message):
    input, target, weight = samples()
    metric = NeuralCollapse(CLASSES, FEATURES)
    metric.update(input, target, weight)
    expected = metric.compute()
    good = {"input": torch.ones(3, 7), "target": torch.zeros(3).long(), "weight": -weight}
    with pytest.raises(error, match=message):
        metric.update(**{**good, **arguments})
    assert_close(metric.compute(), expected, 0)


@pytest.mark.parametrize(
    ("input", "logits", "message"),
    [
        (torch.ones(3, 5), torch.ones(3, 4), "input: expected 7 columns"),
        (torch.ones(3, 7), torch.ones(3, 5), "logits: expected 4 columns"),
        (torch.ones(3, 7), torch.ones(2, 4), "logits: expected 3 rows"),
    ],
)
def test_bad_arguments_of_the_second_pass(input, logits, message):
    metric = NeuralCollapse(CLASSES, FEATURES)
    metric.update(*samples())
    with pytest.raises(ValueError, match=message):
        metric.update_nearest(input, logits)
    assert not metric.has_centers
