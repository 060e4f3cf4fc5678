"""SuspiciousLabels against plain Python on the logits."""

import collections
import json
import math

import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.scored_rows import (
    ScoredRows,
    arrow_bytes,
    merged,
    reduced,
    rows_of_logits,
    task_states,
)
from marginops.scoring import SuspiciousLabels


@st.composite
def labelled_logits(draw):
    count, num_classes = draw(st.integers(0, 40)), draw(st.integers(2, 5))
    # Few distinct values make ties of logits and of margins.
    elements = st.integers(-2, 2).map(float)
    size = count * num_classes
    logits = torch.tensor(draw(st.lists(elements, min_size=size, max_size=size)))
    logits = logits.reshape(count, num_classes)
    labels = st.integers(0, num_classes - 1) | st.just(-100)
    target = torch.tensor(draw(st.lists(labels, min_size=count, max_size=count)), dtype=torch.int64)
    is_finite = torch.ones(count, dtype=torch.bool)
    for row in draw(st.lists(st.integers(0, count - 1), max_size=3)) if count else ():
        logits[row, 0] = math.nan
        is_finite[row] = False
    ids = pa.array(draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)), pa.int64())
    rows = rows_of_logits(logits, target, ids=ids, is_finite=is_finite)
    places = st.lists(st.integers(0, count), max_size=5)
    return logits.tolist(), rows, draw(st.integers(1, 10)), draw(places), draw(places)


def best_class(logits, without=None):
    """The class of the largest logit, the lowest one among equals."""
    classes = [label for label in range(len(logits)) if label != without]
    return max(classes, key=lambda label: (logits[label], -label))


@given(labelled_logits())
def test_issues_and_confusions_are_those_of_the_logits(case):
    logits, rows, k, cuts, tasks = case
    counted = [
        row for row in range(rows.num_rows) if rows.is_finite[row] and rows.target[row] != -100
    ]
    pairs, issues = collections.Counter(), []
    for row in counted:
        label, prediction = int(rows.target[row]), best_class(logits[row])
        if label != prediction:
            pairs[label, prediction] += 1
            rival = best_class(logits[row], without=label)
            margin = logits[row][label] - logits[row][rival]
            issues.append((margin, rows.ids[row].as_py(), row, label, prediction))
    once = reduced(SuspiciousLabels(k), rows)
    table = once.result()
    columns = ["margin", "id", "row", "target", "suggested"]
    selected = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
    assert selected == sorted(issues)[:k]

    summary = once.summary()
    json.dumps(summary, allow_nan=False)
    assert summary["rows"] == rows.num_rows
    assert summary["left_out"] == rows.num_rows - len(counted)
    assert summary["misclassified"] == len(issues)
    assert summary["error_rate"] == (len(issues) / len(counted) if counted else None)
    labels = collections.Counter(int(rows.target[row]) for row in counted)
    wrong = collections.Counter(label for *_, label, _ in issues)
    assert summary["error_rate_per_class"] == [
        wrong[label] / labels[label] if labels[label] else None for label in range(rows.num_classes)
    ]
    ranked = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:20]
    assert summary["most_confused"] == [
        {"label": label, "prediction": prediction, "count": count}
        for (label, prediction), count in ranked
    ]

    states = task_states(SuspiciousLabels(k), rows, tasks, cuts)
    for other in (
        reduced(SuspiciousLabels(k), rows, cuts),
        merged(SuspiciousLabels(k), states),
        merged(SuspiciousLabels(k), states[::-1]),
    ):
        assert arrow_bytes(other.state()) == arrow_bytes(once.state())
        assert arrow_bytes(other.result()) == arrow_bytes(once.result())
        assert other.summary() == summary


@pytest.mark.parametrize("num_classes", [2, 10, 300])
def test_planted_labels_are_found(num_classes):
    random = torch.Generator().manual_seed(8)
    truth = torch.randint(0, num_classes, (5000,), generator=random)
    logits = torch.randn(5000, num_classes, generator=random)
    logits[range(5000), truth] += 12
    planted = torch.randperm(5000, generator=random)[:60]
    target = truth.clone()
    target[planted] = (truth[planted] + 1) % num_classes
    rows = rows_of_logits(logits, target)
    states = task_states(SuspiciousLabels(60), rows, [2000], range(0, 5000, 300))
    reduction = merged(SuspiciousLabels(60), states)
    issues, pairs = reduction.result(), set(zip(target.tolist(), truth.tolist(), strict=True))
    num_wrong_pairs = sum(label != right for label, right in pairs)
    assert len(reduction.summary()["most_confused"]) == min(num_wrong_pairs, 20)
    assert sorted(issues["row"].to_pylist()) == sorted(planted.tolist())
    suggested = torch.from_numpy(issues["suggested"].to_numpy().copy())
    assert torch.equal(suggested, truth[issues["row"].to_pylist()])
    assert issues.schema.names == ["row", "margin", "target", "suggested"]


def test_the_state_holds_rows_and_counts_of_pairs():
    logits = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    rows = rows_of_logits(logits, torch.tensor([0, 1, 0, 0]))
    state = reduced(SuspiciousLabels(1), rows).state()
    assert state.to_pydict() == {
        "row": [1, None, None],
        "margin": [-3.0, None, None],
        "target": [1, 0, 1],
        "suggested": [0, 1, 0],
        "count": [None, 2, 1],
    }


def test_what_a_batch_must_have():
    rows = ScoredRows({"margin": torch.zeros(2), "rival": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"^scored: expected the statistic correct, got margin, r"):
        SuspiciousLabels(1).update(rows.batch(0, 2))
    rows.values["correct"] = torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^scored: expected labels, got none"):
        SuspiciousLabels(1).update(rows.batch(0, 2))
    with pytest.raises(ValueError, match=r"^k: expected at least 1, got 0$"):
        SuspiciousLabels(0)
