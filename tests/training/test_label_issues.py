"""Suspicious labels: their order, the threshold of Pleiss et al., and labels that were changed."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from helpers.dynamics_batches import batches
from helpers.rounding import assert_same
from marginops.training import TrainingDynamics, threshold_samples

SAMPLES = 40


@pytest.fixture
def dynamics(device):
    dynamics = TrainingDynamics(SAMPLES, device=device)
    for batch in batches(SAMPLES - 5, 30, 9):
        dynamics.update(*(value.to(device) for value in batch))
    return dynamics


@pytest.mark.parametrize("by", ["aum", "confidence", "margin_average", "margin", "correctness"])
def test_the_order_is_that_of_the_score(dynamics, by):
    values, count = getattr(dynamics, by).tolist(), dynamics.count.tolist()
    seen = [i for i in range(SAMPLES) if count[i]]
    expected = sorted(seen, key=lambda i: (np.isnan(values[i]), values[i], i))
    issues = dynamics.label_issues(by)
    assert issues.indices.tolist() == expected
    assert_same(issues.scores, getattr(dynamics, by)[issues.indices])
    assert issues.threshold is None and issues.num_issues is None
    assert len(seen) == SAMPLES - 5
    assert str(issues).startswith("LabelIssues(indices=int64[35], scores=float32[35], threshold=N")


@pytest.mark.parametrize("percentile", [99, 50.0, 0, 100])
def test_the_threshold_is_the_percentile_of_the_threshold_samples(dynamics, percentile):
    chosen = torch.tensor([3, 8, 1, 20, 13, 22])
    issues = dynamics.label_issues(threshold_samples=chosen, percentile=percentile)
    threshold = np.percentile(dynamics.aum[chosen.to(dynamics.device)].cpu().numpy(), percentile)
    assert issues.threshold == pytest.approx(threshold)
    assert not set(issues.indices.tolist()) & set(chosen.tolist())
    assert len(issues.indices) == SAMPLES - 5 - len(chosen)
    assert issues.num_issues == sum(score < threshold for score in issues.scores.tolist())


def test_a_threshold_needs_finite_margins(dynamics):
    nan = torch.tensor([[float("nan"), 0.0]], device=dynamics.device)
    dynamics.update(torch.tensor([3]), nan, torch.tensor([0], device=dynamics.device))
    assert dynamics.label_issues(threshold_samples=torch.tensor([3, 8])).num_issues > 0
    with pytest.raises(ValueError, match="finite score, and 1 have none, such as 3"):
        dynamics.label_issues("margin", threshold_samples=torch.tensor([3, 8]))


def test_no_sample_was_seen():
    assert len(TrainingDynamics(3).label_issues().indices) == 0


WRONG = {
    'by: expected "aum", .* or "correctness", got \'el2n\'': ({"by": "el2n"}, ValueError),
    r"threshold_samples: expected a tensor \[K\], got list": ([1], TypeError),
    "threshold_samples: expected dtype torch.int64, got torch.float32": (torch.ones(1), TypeError),
    "threshold_samples: expected at least one sample": (torch.tensor([]).long(), ValueError),
    r"threshold_samples: expected values in \[0, 40\), got 40": (torch.tensor([40]), ValueError),
    r"threshold_samples: expected values in \[0, 40\), got -1": (torch.tensor([-1]), ValueError),
    "threshold_samples: expected samples with a finite score, and 2 have none, such as 38": (
        torch.tensor([1, 38, 39]),
        ValueError,
    ),
    r"percentile: expected a value in \[0, 100\], got 101": ({"percentile": 101}, ValueError),
    r"percentile: expected a value in \[0, 100\], got nan": (
        {"percentile": float("nan")},
        ValueError,
    ),
    "percentile: expected a float, got str": ({"percentile": "99"}, TypeError),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(dynamics, message):
    value, kind = WRONG[message]
    options = value if isinstance(value, dict) else {"threshold_samples": value}
    with pytest.raises(kind, match=message):
        dynamics.label_issues(**{"threshold_samples": torch.tensor([1]), **options})


def test_threshold_samples_have_the_class_that_is_added(device):
    target = (torch.arange(120) % 4).to(device)
    indices, labels = threshold_samples(target, 4, seed=3)
    assert len(indices) == 24 and (indices.diff() > 0).all()
    is_chosen = torch.zeros(120, dtype=torch.bool, device=device)
    is_chosen[indices] = True
    assert (labels[is_chosen] == 4).all() and torch.equal(labels[~is_chosen], target[~is_chosen])
    assert torch.equal(threshold_samples(target.cpu(), 4, seed=3).indices.to(device), indices)
    assert not torch.equal(threshold_samples(target, 4, seed=4).indices, indices)
    assert len(threshold_samples(target, 4, num_samples=7).indices) == 7
    assert not (target == 4).any()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"target": [0, 1]}, TypeError, "target: expected a tensor [N], got list"),
        ({"target": torch.tensor([0, 4])}, ValueError, "target: expected classes in [0, 4), got 4"),
        (
            {"target": torch.tensor([-100])},
            ValueError,
            "target: expected classes in [0, 4), got -",
        ),
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"num_samples": 0}, ValueError, "num_samples: expected 1 to 9 of 10 samples, got 0"),
        ({"num_samples": 10}, ValueError, "num_samples: expected 1 to 9 of 10 samples, got 10"),
        ({"num_samples": 1.5}, TypeError, "num_samples: expected an int, got float"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"num_classes": 10}, ValueError, "num_samples: expected 1 to 9 of 10 samples, got 0"),
    ],
)
def test_wrong_arguments_of_threshold_samples(arguments, kind, message):
    right = {"target": torch.arange(10) % 4, "num_classes": 4}
    with pytest.raises(kind, match=re.escape(message)):
        threshold_samples(**{**right, **arguments})


def test_labels_that_were_changed_are_found():
    """Three noisy clusters with a tenth of wrong labels, and threshold samples beside them."""
    clean = torch.arange(600) % 3
    inputs = 3 * torch.eye(3, 20)[clean] + torch.randn(600, 20)
    is_wrong = torch.rand(600) < 0.1
    target = torch.where(is_wrong, (clean + 1) % 3, clean)
    chosen, labels = threshold_samples(target, 3, num_samples=60)
    network = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    dynamics = TrainingDynamics(600)
    for _ in range(15):
        for indices in torch.randperm(600).split(50):
            statistics = dynamics.update(indices, network(inputs[indices]), labels[indices])
            optimizer.zero_grad()
            statistics.mean_loss().backward()
            optimizer.step()
    issues = dynamics.label_issues(threshold_samples=chosen)
    wrong = is_wrong[issues.indices].tolist()
    pairs = [(i, j) for i, a in enumerate(wrong) for j, b in enumerate(wrong) if a and not b]
    assert np.mean([i < j for i, j in pairs]) > 0.95  # the area under the ROC curve
    found = sum(wrong[: issues.num_issues])
    assert found > 0.9 * sum(wrong)
    assert found / issues.num_issues > 3 * np.mean(wrong)  # and few others
