"""Smallest and SmallestPerClass against Python's sorted, for any batches, tasks and merges."""

import itertools
import math
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.scored_rows import ScoredRows, arrow_bytes, merged, reduced, task_states
from marginops.scoring import Smallest, SmallestPerClass

_scores = st.sampled_from([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0, 2.5, 1e-45, -3e38])
# The order of UTF-8 differs from those of UTF-16 and of languages.
_texts = st.sampled_from(["", "a", "b", "Z", "é", "\uffee", "\U0001f600", "a\0", "10", "9"])
_ids = {
    pa.int64(): st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1]),
    pa.uint64(): st.integers(0, 3) | st.sampled_from([2**63, 2**64 - 1]),
    pa.int16(): st.integers(-3, 3),
    pa.uint8(): st.integers(0, 255),
    pa.string(): _texts,
    pa.large_string(): _texts,
    pa.dictionary(pa.int32(), pa.string()): _texts,
}


@st.composite
def selections(draw):
    """Rows, a selection of them, and how they are cut and merged."""
    count = draw(st.integers(0, 40))

    def column(elements):
        return draw(st.lists(elements, min_size=count, max_size=count))

    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    values = {"margin": torch.tensor(column(_scores), dtype=torch.float64).to(dtype)}
    values["prediction"] = torch.tensor(column(st.integers(0, 2)), dtype=torch.int64)
    ids = target = None
    if draw(st.booleans()):
        id_type = draw(st.sampled_from(list(_ids)))
        ids = pa.array(column(_ids[id_type] | st.none()), id_type)
    if draw(st.booleans()):
        target = torch.tensor(column(st.sampled_from([-7, 0, 1, 2])), dtype=torch.int64)
    is_finite = torch.tensor(column(st.booleans()), dtype=torch.bool)
    rows = ScoredRows(values, ids=ids, target=target, is_finite=is_finite, ignore_index=-7)
    k, largest = draw(st.integers(1, 12)), draw(st.booleans())
    places = st.lists(st.integers(0, count), max_size=6)
    return rows, k, largest, draw(places), draw(places), draw(st.randoms(use_true_random=False))


def expected_order(rows, largest, chosen):
    scores = rows.values["margin"].tolist()
    ids = [None] * rows.num_rows if rows.ids is None else rows.ids.to_pylist()

    def key(row):
        score, id = scores[row], ids[row]
        score = -score if largest else score
        number, text = (0, id.encode()) if isinstance(id, str) else (id or 0, b"")
        is_nan = math.isnan(score)
        return is_nan, 0 if is_nan else score, id is None, number, text, row

    return sorted(chosen, key=key)


def assert_is_selection(table, rows, expected):
    assert table["row"].to_pylist() == expected
    index = torch.tensor(expected, dtype=torch.int64)
    scores = torch.from_numpy(table["margin"].to_numpy().copy())
    torch.testing.assert_close(
        scores, rows.values["margin"][index], rtol=0, atol=0, equal_nan=True, check_dtype=True
    )
    assert table["prediction"].to_pylist() == rows.values["prediction"][index].tolist()
    assert ("id" in table.column_names) == (rows.ids is not None)
    if rows.ids is not None:
        assert table["id"].to_pylist() == [rows.ids[row].as_py() for row in expected]
    assert ("target" in table.column_names) == (rows.target is not None)
    if rows.target is not None:
        assert table["target"].to_pylist() == rows.target[index].tolist()


def merged_as_tree(reduction, states, random):
    """Merge the states two by two in a random order."""
    states = list(states)
    while len(states) > 1:
        random.shuffle(states)
        states.append(merged(reduction, [states.pop(), states.pop()]).state())
    return merged(reduction, states)


def labelled_rows(rows):
    return [row for row in range(rows.num_rows) if rows.target[row] != rows.ignore_index]


@given(selections())
def test_smallest_is_the_sorted_order_however_rows_are_cut_and_merged(case):
    rows, k, largest, cuts, tasks, random = case
    by = "margin"
    if rows.target is None:  # a score that needs no label
        by = "top2_margin"
        rows.values[by] = rows.values["margin"]
    reduction = Smallest(k, by, largest)
    chosen = range(rows.num_rows) if rows.target is None else labelled_rows(rows)
    expected = expected_order(rows, largest, chosen)[:k]
    once = reduced(reduction, rows)
    table = once.result().rename_columns({by: "margin"})
    assert_is_selection(table, rows, expected)
    states = task_states(reduction, rows, tasks, cuts)
    for other in (
        reduced(reduction, rows, cuts),
        merged(reduction, states),
        merged(reduction, states[::-1]),
        merged_as_tree(reduction, states, random),
    ):
        assert arrow_bytes(other.result()) == arrow_bytes(once.result())
        assert arrow_bytes(other.state()) == arrow_bytes(once.state())
        assert other.summary() == once.summary()
    summary = once.summary()
    assert summary["rows"] == rows.num_rows and summary["selected"] == len(expected)
    assert summary["left_out"] == rows.num_rows - len(chosen)
    for name, place in (("first_score", 0), ("last_score", -1)):
        score = rows.values["margin"][expected[place]].item() if expected else math.nan
        assert summary[name] == (score if math.isfinite(score) else None)


@given(selections())
def test_smallest_per_class_is_the_sorted_order_of_each_class(case):
    rows, k, largest, cuts, tasks, random = case
    reduction = SmallestPerClass(k, "margin", largest)
    if rows.target is None:
        classes = rows.values["prediction"].tolist()
        chosen = rows.is_finite.nonzero().flatten().tolist()
    else:
        classes, chosen = rows.target.tolist(), labelled_rows(rows)
    members = [[row for row in chosen if classes[row] == label] for label in range(3)]
    expected = [expected_order(rows, largest, rows_of_class)[:k] for rows_of_class in members]
    once = reduced(reduction, rows)
    assert_is_selection(once.result(), rows, list(itertools.chain(*expected)))
    states = task_states(reduction, rows, tasks, cuts)
    for other in (
        reduced(reduction, rows, cuts),
        merged(reduction, states),
        merged_as_tree(reduction, states, random),
    ):
        assert arrow_bytes(other.result()) == arrow_bytes(once.result())
        assert arrow_bytes(other.state()) == arrow_bytes(once.state())
    summary = once.summary()
    assert summary["class"] == ("prediction" if rows.target is None else "target")
    assert summary["selected_per_class"] == [len(selected) for selected in expected]
    assert summary["left_out"] == rows.num_rows - len(chosen)


def large_rows(scores, num_classes=50, ids=None):
    count = len(scores)
    random = torch.Generator().manual_seed(3)
    target = torch.randint(0, num_classes, (count,), generator=random)
    target[::7] = -100
    values = {"margin": scores, "prediction": target.clamp(min=0)}
    return ScoredRows(values, num_classes=num_classes, ids=ids, target=target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0.0, 0.5, 1e-3])
def test_large_selections_with_ties(dtype, step):
    scores = torch.randn(60_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores = (torch.round(scores / step) * step if step else scores).to(dtype)
    ids = np.random.default_rng(2).integers(0, 1000, len(scores))
    rows = large_rows(scores, ids=pa.array(ids))
    labelled = (rows.target != -100).nonzero().flatten().numpy()
    order = labelled[np.lexsort((labelled, ids[labelled], scores.numpy()[labelled]))]
    cuts = range(0, len(scores), 4096)
    smallest = reduced(Smallest(700, "margin"), rows, cuts)
    assert smallest.result()["row"].to_pylist() == order[:700].tolist()
    per_class = merged(
        SmallestPerClass(60, "margin"),
        task_states(SmallestPerClass(60, "margin"), rows, [20_000, 35_000], cuts),
    )
    labels = rows.target.numpy()[order]
    expected = np.concatenate([order[labels == label][:60] for label in range(50)])
    assert per_class.result()["row"].to_pylist() == expected.tolist()


@pytest.mark.parametrize("kind", ["equal", "nan", "descending", "random"])
@pytest.mark.parametrize("texts", [False, True])
def test_memory_is_that_of_the_selection(kind, texts):
    """Scores that all tie, and scores each of which is better than all before it."""
    count, batch, k = 300_000, 10_000, 1000
    scores = {
        "equal": torch.ones(count),
        "nan": torch.full((count,), torch.nan),
        "descending": -torch.arange(count).float(),
        "random": torch.randn(count, generator=torch.Generator().manual_seed(1)),
    }[kind]
    names = np.arange(count, 0, -1)  # the later, the smaller
    ids = pa.array([f"{name:06}" for name in names]) if texts else pa.array(names)
    rows = large_rows(scores, num_classes=20, ids=ids)
    smallest, per_class = Smallest(k, "margin"), SmallestPerClass(k // 20, "margin")
    most = 0
    for start in range(0, count, batch):
        smallest.update(rows.batch(start, start + batch))
        per_class.update(rows.batch(start, start + batch))
        most = max(most, len(pickle.dumps(smallest)), len(pickle.dumps(per_class)))
    assert most < 60 * (2 * k + batch)  # bytes of a row, with its id
    if kind != "random":
        expected = [row for row in range(count)[::-1] if row % 7][:k]
        assert smallest.result()["row"].to_pylist() == expected
        assert per_class.result().num_rows == k


def test_scores_of_a_float64_scorer_keep_their_digits():
    scores = torch.tensor([1 + 2**-40, 1 + 2**-41, 1.0], dtype=torch.float64)
    rows = ScoredRows({"top2_margin": scores})
    result = reduced(Smallest(2, "top2_margin"), rows).result()
    assert result["top2_margin"].to_pylist() == [1.0, 1 + 2**-41]


def test_the_prediction_is_a_column_only_where_it_is_known():
    rows = ScoredRows({"top2_margin": torch.tensor([3.0, 1.0])})
    result = reduced(Smallest(1, "top2_margin"), rows).result()
    assert result.to_pydict() == {"row": [1], "top2_margin": [1.0]}


def test_ids_of_another_kind_are_an_error():
    reduction = Smallest(5, "top2_margin")
    scores = {"top2_margin": torch.zeros(2)}
    reduction.update(ScoredRows(scores, ids=pa.array([1, 2], pa.int32())).batch(0, 2))
    reduction.update(ScoredRows(scores, ids=pa.array([1, 2], pa.int64())).batch(0, 2))
    texts = ScoredRows(scores, ids=pa.array(["1", "2"]))
    with pytest.raises(
        ValueError, match=r"^rows: expected the columns id int64, .* as before, got"
    ):
        reduction.update(texts.batch(0, 2))
    floats = ScoredRows(scores, ids=pa.array([1.0, 2.0]))
    with pytest.raises(TypeError, match=r"^ids: expected integers or strings, got double$"):
        reduction.update(floats.batch(0, 2))
    assert reduction.result().num_rows == 4


@pytest.mark.parametrize("kind", [Smallest, SmallestPerClass])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "k: expected at least 1, got 0"),
        ((True,), TypeError, "k: expected an int, got bool"),
        ((2.0,), TypeError, "k: expected an int, got float"),
        ((1, 3), TypeError, "by: expected the name of a statistic or None, got int"),
        (
            (1, "rival"),
            ValueError,
            'by: expected "margin", .* or "probability_margin", got \'rival',
        ),
        ((1, "margins"), ValueError, "by: expected .* got 'margins'"),
        ((1, "margin", 1), TypeError, "largest: expected a bool, got int"),
    ],
)
def test_wrong_arguments(kind, arguments, error, message):
    with pytest.raises(error, match=f"^{message}"):
        kind(*arguments)
