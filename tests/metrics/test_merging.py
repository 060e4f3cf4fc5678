"""Metrics of several workers, windows and collections are those of one metric that saw the same."""

import itertools
import json
import math
import warnings

import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.wrappers import Running

from helpers.ranks import Ranks
from marginops.metrics import ClassManifolds, MarginDistribution, NeuralCollapse

CLASSES, FEATURES = 3, 4
METRICS = {
    "margins": lambda **options: MarginDistribution(**options),
    "exact margins": lambda **options: MarginDistribution(exact=True, **options),
    "manifolds": lambda **options: ClassManifolds(CLASSES, FEATURES, **options),
    "collapse": lambda **options: NeuralCollapse(CLASSES, FEATURES, **options),
    "two passes": lambda **options: NeuralCollapse(CLASSES, FEATURES, two_passes=True, **options),
}
WITH_WEIGHT = ("collapse", "two passes")


def parts(name, count=4):
    """The arguments of ``update`` for several batches of different sizes."""
    cuts = [0, 9, 9, 31, 50][: count + 1]
    target = torch.arange(50) % CLASSES
    input = torch.randn(50, FEATURES) + 2 * torch.randn(CLASSES, FEATURES)[target]
    weight = torch.randn(CLASSES, FEATURES)
    batches = []
    for first, last in itertools.pairwise(cuts):
        rows, classes = input[first:last], target[first:last]
        whole = (rows, classes, weight) if name in WITH_WEIGHT else (rows, classes)
        batches.append((rows[:, 0],) if "margins" in name else whole)
    return batches


def updated(name, batches, **options):
    metric = METRICS[name](**options)
    for batch in batches:
        metric.update(*batch)
    return metric


def assert_same(actual, expected):
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("form", ["metric", "metric_state", "state_dict"])
@pytest.mark.parametrize("name", METRICS)
def test_merged_workers(name, form):
    batches = parts(name)
    expected = updated(name, batches).compute()
    first, second = updated(name, batches[:2]), updated(name, batches[2:])
    first.compute()
    kept = second.compute()
    incoming = {
        "metric": second,
        "metric_state": second.metric_state,
        "state_dict": second.state_dict(),
    }
    first.merge_state(incoming[form])
    assert_same(first.compute(), expected)
    # The two stay independent.
    first.update(*batches[0])
    second._computed = None
    assert_same(second.compute(), kept)


@pytest.mark.parametrize("name", METRICS)
def test_merging_with_an_empty_metric_or_itself(name):
    batches = parts(name)
    expected = updated(name, batches).compute()
    empty, full = METRICS[name](), updated(name, batches)
    full.merge_state(METRICS[name]())
    assert_same(full.compute(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the merged metric has been updated
        empty.merge_state(full)
        assert_same(empty.compute(), expected)
    full.merge_state(full)
    assert_same(full.compute(), updated(name, batches + batches).compute())


@pytest.mark.parametrize("incoming", [3, None, "x", [1], torch.nn.Linear(1, 1)])
@pytest.mark.parametrize("name", METRICS)
def test_merging_with_anything_else(name, incoming):
    with pytest.raises(TypeError, match=r"incoming_state: expected a metric .* or its state, got"):
        METRICS[name]().merge_state(incoming)


def test_the_last_weight_counts():
    batches = parts("collapse", 3)
    other = -2 * batches[2][2] + 1
    second = NeuralCollapse(CLASSES, FEATURES)
    second.update(*batches[2][:2], other)
    whole = updated("collapse", [batches[0], (*batches[2][:2], other)])
    first = updated("collapse", batches[:1])
    first.merge_state(second)
    assert_same(first.compute(), whole.compute())
    first = updated("collapse", batches[:1])
    first.merge_state(updated("collapse", [batches[2][:2]]))
    assert torch.equal(first.weight, batches[0][2].double())


def test_forward_takes_the_weight_of_its_call():
    batches = parts("collapse")
    later = (*batches[2][:2], batches[2][2] * 2 + 1)
    metric = updated("collapse", batches[:1])
    metric(*later)
    assert_same(metric.compute(), updated("collapse", [batches[0], later]).compute())


def test_merged_second_passes():
    batches = parts("collapse")
    logits = torch.randn(50, CLASSES).split([9, 0, 22, 19])
    whole = updated("collapse", batches)
    for batch, values in zip(batches, logits, strict=True):
        whole.update_nearest(batch[0], values)
    # Both have the means of all samples, as processes have them.
    centers = updated("collapse", batches)
    centers.update_nearest(batches[1][0], logits[1])
    shards = [updated("collapse", batches[:2]), updated("collapse", batches[2:])]
    for index, shard in enumerate(shards):
        shard.load_state_dict(
            {
                **shard.state_dict(),
                **{key: centers.state_dict()[key] for key in ("centers", "has_centers")},
            }
        )
        for batch, values in list(zip(batches, logits, strict=True))[2 * index :][:2]:
            shard.update_nearest(batch[0], values)
    shards[0].merge_state(shards[1])
    assert_same(shards[0].compute(), whole.compute())
    # A pass that an update has stopped does not go on.
    stopped, other = (NeuralCollapse(CLASSES, FEATURES) for _ in range(2))
    stopped.load_state_dict({**whole.state_dict(), "has_centers": torch.tensor(False)})
    other.load_state_dict(whole.state_dict())
    other.merge_state(stopped)
    assert other.compute().nc4.isnan()
    # An empty metric changes no mean. More samples do, so the pass starts again.
    whole.merge_state(NeuralCollapse(CLASSES, FEATURES))
    assert not whole.compute().nc4.isnan()
    whole.merge_state(updated("collapse", batches[:1]))
    assert whole.compute().nc4.isnan()
    whole.update_nearest(batches[0][0], logits[0])
    assert whole.compared == 9


@pytest.mark.parametrize("with_forward", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_windows(name, with_forward):
    batches = parts(name)
    running = Running(METRICS[name](), window=2)
    for index, batch in enumerate(batches):
        if with_forward:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert_same(running(*batch), updated(name, [batch]).compute())
        else:
            running.update(*batch)
        assert_same(
            running.compute(), updated(name, batches[max(index - 1, 0) : index + 1]).compute()
        )


def test_a_window_of_different_weights_has_no_weight():
    batches = parts("collapse")
    running = Running(NeuralCollapse(CLASSES, FEATURES), window=2)
    running.update(*batches[0])
    running.update(*batches[2][:2], batches[2][2] * 2)
    summary = running.compute()
    expected = updated("collapse", [batches[0][:2], batches[2][:2]]).compute()
    assert_same(summary, expected)
    assert summary.nc3.isnan() and not summary.nc1.isnan()


def test_a_window_does_not_convert_counts():
    running = Running(ClassManifolds(CLASSES, FEATURES), window=2)
    running.update(*parts("manifolds")[0])
    running.set_dtype(torch.float16)
    with pytest.raises(ValueError, match=r"incoming_state: expected .*got .*torch.float16"):
        running.compute()


@pytest.mark.parametrize("name", METRICS)
def test_forward_in_a_collection(name):
    batches = parts(name)
    metrics = MetricCollection({"a": METRICS[name](), "b": METRICS[name]()})
    metrics.update(*batches[0])
    for index, batch in enumerate(batches[2:], start=2):
        values = metrics(*batch)
        assert_same(values["a"], updated(name, [batches[index]]).compute())
    result = metrics.compute()
    expected = updated(name, [batches[0], *batches[2:]]).compute()
    assert_same(result["a"], expected)
    assert_same(result["b"], expected)


class Scaled(ClassManifolds):
    """A user's metric whose update depends on an attribute that only it knows."""

    def __init__(self, factor):
        super().__init__(2, 4)
        self.factor = factor

    def update(self, input, target):
        super().update(input * self.factor, target)


PAIRS = {
    "normalize": [lambda: ClassManifolds(2, 4, normalize=False), lambda: ClassManifolds(2, 4)],
    "ignore_index": [lambda: ClassManifolds(2, 4, ignore_index=7), lambda: ClassManifolds(2, 4)],
    "close ignore_index": [
        lambda: ClassManifolds(2, 4, ignore_index=10**6),
        lambda: ClassManifolds(2, 4, ignore_index=10**6 + 1),
    ],
    "collapse": [lambda: NeuralCollapse(2, 4, ignore_index=7), lambda: NeuralCollapse(2, 4)],
    "two passes": [lambda: NeuralCollapse(2, 4, two_passes=True), lambda: NeuralCollapse(2, 4)],
    "metrics": [lambda: NeuralCollapse(2, 4), lambda: ClassManifolds(2, 4)],
    "subclass": [lambda: Scaled(2.0), lambda: ClassManifolds(2, 4)],
    "attribute": [lambda: Scaled(2.0), lambda: Scaled(3.0)],
}


@pytest.mark.parametrize("pair", PAIRS)
def test_metrics_that_differ_share_no_state(pair):
    first, second = PAIRS[pair]
    metrics = MetricCollection({"first": first(), "second": second()})
    # After this batch their other states are equal.
    metrics.update(torch.zeros(8, 4), torch.arange(8) % 2)
    assert len(metrics.compute_groups) == 2


def test_radii_of_a_collection_are_those_of_the_metrics():
    input, target = 5 * torch.randn(8, 4), torch.arange(8) % 2
    metrics = MetricCollection(
        {"raw": ClassManifolds(2, 4, normalize=False), "sphere": ClassManifolds(2, 4)}
    )
    metrics.update(torch.zeros(8, 4), target)
    metrics.reset()
    metrics.update(input, target)
    for name, normalize in (("raw", False), ("sphere", True)):
        alone = ClassManifolds(2, 4, normalize=normalize)
        alone.update(input, target)
        assert_same(metrics.compute()[name], alone.compute())


def test_metrics_that_agree_share_a_state():
    metrics = MetricCollection(
        {"few": MarginDistribution(decades=1), "median": MarginDistribution(quantiles=[0.5])}
    )
    for _ in range(2):
        metrics.update(torch.randn(9))
    assert len(metrics.compute_groups) == 1
    assert metrics["few"].bin_counts.sum() == 18
    assert metrics.compute()["median"].count == 18


def test_the_configuration_is_readable():
    text = bytes(ClassManifolds(3, 4).configuration.tolist())
    assert json.loads(text) == {
        **{"metric": "ClassManifolds", "num_classes": 3, "num_features": 4},
        **{"normalize": True, "ignore_index": -100},
    }


def error_of_rank(groups, arguments):
    normalize, num_classes = arguments
    metric = ClassManifolds(num_classes, FEATURES, normalize=normalize)
    metric.update(torch.ones(3, FEATURES), torch.zeros(3, dtype=torch.int64))
    before = metric.state_dict()
    try:
        metric.compute()
    except ValueError as error:
        unchanged = all(
            torch.equal(before[name].nan_to_num(), metric.state_dict()[name].nan_to_num())
            for name in before
        )
        return str(error), unchanged
    return "no error", True


@pytest.mark.parametrize("arguments", [[(True, 3), (False, 3)], [(True, 3), (True, 4)]], ids=str)
def test_processes_with_other_arguments(tmp_path, arguments):
    with Ranks(2, tmp_path) as ranks:
        answers = ranks.results(error_of_rank, arguments)
    for answer in answers:
        assert "metrics of the processes: expected n" in answer[0] and answer[1]


def test_exact_margins_are_copies():
    margins = torch.tensor([1.0, 2.0], dtype=torch.float64)
    metric = MarginDistribution(exact=True, quantiles=[1.0])
    metric.update(margins)
    margins.fill_(math.nan)
    assert metric.compute().quantiles.tolist() == [2.0]
