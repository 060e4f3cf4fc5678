"""Metrics of class geometry give the same results in several processes as in one."""

import pytest
import torch

from helpers.ranks import Ranks
from marginops.metrics import ClassManifolds, NeuralCollapse

CLASSES, FEATURES = 4, 7
RANKS = 2


def results(batches, two_passes):
    """The results of both metrics; those of the second pass also after an update that follows."""
    collapse = NeuralCollapse(CLASSES, FEATURES, two_passes=two_passes)
    manifolds = ClassManifolds(CLASSES, FEATURES)
    for input, target, weight, _ in batches:
        collapse.update(input, target, weight)
        manifolds.update(input, target)
    early = collapse.compute()
    assert early.nc4.isnan() and early.nc1.isnan() == two_passes
    for input, target, _, logits in batches:
        collapse.update_nearest(input, logits, target)
    late = collapse.compute()
    collapse.update_nearest(input[:0], logits[:0], target[:0])
    # compute() has restored the state of this process.
    assert collapse.count.shape == manifolds.count.shape == (CLASSES,)
    assert collapse.centers.shape == manifolds.mean.shape == (CLASSES, FEATURES)
    return [*early[1:6], *late, collapse.compute().nc4, *manifolds.compute()]


def results_of_rank(groups, arguments):
    return results(*arguments)


@pytest.mark.parametrize("two_passes", [False, True])
def test_processes_give_the_results_of_one(tmp_path, two_passes):
    target = torch.randint(0, CLASSES, (80,))
    input = torch.randn(CLASSES, FEATURES)[target] + torch.randn(80, FEATURES) / 2 + 3
    weight, logits = torch.randn(CLASSES, FEATURES), torch.randn(80, CLASSES)
    cuts = [slice(0, 0), slice(0, 30), slice(30, 37), slice(37, 80)]
    weights = [None, None, weight, None]
    batches = [
        (input[cut].double(), target[cut], given, logits[cut])
        for cut, given in zip(cuts, weights, strict=True)
    ]
    expected = results(batches, two_passes)
    arguments = [(batches[:2], two_passes), (batches[2:], two_passes)]
    with Ranks(RANKS, tmp_path) as ranks:
        answers = ranks.results(results_of_rank, arguments, timeout=120)
    for answer in answers:
        for actual, value, other in zip(answer, expected, answers[0], strict=True):
            assert torch.equal(actual, other)
            torch.testing.assert_close(actual, value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("metric", [NeuralCollapse, ClassManifolds])
def test_a_metric_can_be_pickled_and_cloned(metric):
    original = metric(CLASSES, FEATURES)
    original.update(torch.randn(50, FEATURES), torch.arange(50) % CLASSES)
    torch.testing.assert_close(
        original.clone().compute(), original.compute(), rtol=0, atol=0, equal_nan=True
    )
