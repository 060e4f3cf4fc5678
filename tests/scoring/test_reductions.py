"""What all reductions have in common: copies, states as files, and merges that are refused."""

import copy
import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.scored_rows import (
    arrow_bytes,
    from_arrow_bytes,
    merged,
    reduced,
    rows_of_logits,
    task_states,
)
from marginops.scoring import (
    Margins,
    Moments,
    Reduction,
    Smallest,
    SmallestPerClass,
    SuspiciousLabels,
)

REDUCTIONS = [
    Smallest(7, "margin"),
    Smallest(5, "loss", largest=True),
    SmallestPerClass(3, "confidence"),
    Margins("margin"),
    Moments(),
    SuspiciousLabels(4),
]
every_reduction = pytest.mark.parametrize(
    "reduction", REDUCTIONS, ids=lambda reduction: str(reduction.describe())
)


def some_rows(count=90, num_classes=4, texts=False):
    random = torch.Generator().manual_seed(4)
    logits = torch.randn(count, num_classes, generator=random)
    target = torch.randint(0, num_classes, (count,), generator=random)
    target[::9] = -100
    names = [str(name) for name in range(count)] if texts else range(count)
    return rows_of_logits(logits, target, ids=pa.array(names), features=logits)


@every_reduction
@pytest.mark.parametrize("texts", [False, True])
def test_states_survive_files_copies_and_pickles(reduction, texts):
    rows = some_rows(texts=texts)
    states = task_states(reduction, rows, [20, 50], [10, 30, 60])
    want = merged(reduction, states)
    files = [from_arrow_bytes(arrow_bytes(state)) for state in states]
    copied = merged(pickle.loads(pickle.dumps(reduction)), files[:2])
    copied = pickle.loads(pickle.dumps(copied))
    copied.merge(files[2])
    for other in (copied, copy.deepcopy(want)):
        assert arrow_bytes(other.state()) == arrow_bytes(want.state())
        assert arrow_bytes(other.result()) == arrow_bytes(want.result())
        assert other.summary() == want.summary()
    # A state can be asked for at any time, and a merge leaves it as it is.
    assert arrow_bytes(states[0]) == arrow_bytes(files[0])
    assert reduction.summary()["rows"] == 0


@every_reduction
def test_equal_content_is_written_with_equal_bytes(reduction):
    rows = some_rows()
    first = reduced(reduction, rows).state()
    again = pa.concat_tables([first.slice(0, 1), first.slice(1)]).replace_schema_metadata(
        first.schema.metadata
    )
    state = merged(reduction, [again]).state()
    if not isinstance(reduction, Moments):  # a radius is squared in a merge, which rounds it
        assert arrow_bytes(state) == arrow_bytes(first)
    assert arrow_bytes(reduced(reduction, rows).state()) == arrow_bytes(first)


@every_reduction
def test_the_result_can_be_a_parquet_file(reduction, tmp_path):
    filled = reduced(reduction, some_rows())
    for table in (filled.result(), copy.deepcopy(reduction).result()):
        pq.write_table(table, tmp_path / "result.parquet")
        assert pq.read_table(tmp_path / "result.parquet").equals(table)
    json.dumps(filled.summary(), allow_nan=False)
    json.dumps(reduction.summary(), allow_nan=False)
    assert filled.result().num_rows > 0


@every_reduction
def test_empty_tasks_change_nothing(reduction):
    rows = some_rows()
    states = task_states(reduction, rows, [0, 40, 40, 90], [20])
    empty = copy.deepcopy(reduction).state()
    assert empty.num_rows == 0
    want = merged(reduction, states)
    other = merged(reduction, [empty, *states, empty])
    assert arrow_bytes(other.state()) == arrow_bytes(want.state())
    assert merged(reduction, [empty, empty]).summary() == reduction.summary()
    assert arrow_bytes(from_arrow_bytes(arrow_bytes(empty))) == arrow_bytes(empty)


@every_reduction
def test_states_of_other_reductions_are_refused(reduction):
    rows = some_rows()
    others = [Smallest(6, "margin"), Smallest(5, "loss"), SmallestPerClass(3, "entropy")]
    others += [Margins("top2_margin"), SuspiciousLabels(5)]
    if not isinstance(reduction, Moments):
        others.append(Moments())
    filled = reduced(reduction, rows)
    before = arrow_bytes(filled.state())
    for other in others:
        with pytest.raises(
            ValueError, match=r"^state: expected a state of {'class': .*got one of {"
        ):
            filled.merge(other.state())
    with pytest.raises(
        ValueError, match=r"^state: expected a state of .*, got a table without its"
    ):
        filled.merge(filled.result())
    assert arrow_bytes(filled.state()) == before


@every_reduction
def test_descriptions(reduction):
    described = json.loads(json.dumps(reduction.describe()))
    arguments = {name: value for name, value in described.items() if name != "class"}
    assert described["class"] == type(reduction).__name__
    assert type(reduction)(**arguments).describe() == described
    assert reduction.resolved("entropy").describe() == described
    names = {other.name for other in REDUCTIONS}
    assert len(names) == len({type(other) for other in REDUCTIONS})
    assert isinstance(reduction, Reduction)


@pytest.mark.parametrize("kind", [Smallest, SmallestPerClass])
def test_the_default_score_is_that_of_the_scorer(kind):
    reduction = kind(2, largest=True)
    assert "entropy" not in reduction.statistics
    with pytest.raises(
        ValueError, match=r"^by: expected the name of a statistic, got None; call re"
    ):
        reduction.update(some_rows().batch(0, 4))
    resolved = reduction.resolved("entropy")
    assert resolved.describe() == kind(2, "entropy", True).describe()
    assert "entropy" in resolved.statistics


def test_a_batch_without_the_statistic_is_an_error():
    with pytest.raises(
        ValueError, match=r"^scored: expected the statistic minimal_margin, got mar"
    ):
        Smallest(2, "minimal_margin").update(some_rows().batch(0, 4))
