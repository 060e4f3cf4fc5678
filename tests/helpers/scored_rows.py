"""Scored rows of a whole data set, cut into batches and tasks, and what reductions make of them."""

import copy
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from marginops import sample_statistics
from marginops.scoring import Reduction, ScoredBatch


@dataclass
class ScoredRows:
    """All rows of a data set with their statistics."""

    values: dict[str, Tensor]
    num_classes: int = 3
    ids: pa.Array | None = None
    target: Tensor | None = None
    features: Tensor | None = None
    is_finite: Tensor | None = None
    ignore_index: int = -100
    num_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_rows = len(next(iter(self.values.values())))
        if self.is_finite is None:
            self.is_finite = torch.ones(self.num_rows, dtype=torch.bool)

    def batch(self, start: int, stop: int) -> ScoredBatch:
        return ScoredBatch(
            first_row=start,
            values={name: value[start:stop] for name, value in self.values.items()},
            ids=None if self.ids is None else self.ids[start:stop],
            target=None if self.target is None else self.target[start:stop],
            ignore_index=self.ignore_index,
            features=None if self.features is None else self.features[start:stop],
            num_classes=self.num_classes,
            is_finite=self.is_finite[start:stop],
            counts={"rows": stop - start},
        )


def reduced(reduction: Reduction, rows: ScoredRows, cuts: Sequence[int] = ()) -> Reduction:
    """A copy of an empty reduction that has seen the rows in batches between the cuts."""
    filled = copy.deepcopy(reduction)
    places = [0, *sorted(cuts), rows.num_rows]
    for start, stop in itertools.pairwise(places):
        filled.update(rows.batch(start, stop))
    return filled


def task_states(
    reduction: Reduction, rows: ScoredRows, tasks: Sequence[int], cuts: Sequence[int] = ()
) -> list[pa.Table]:
    """The states of tasks between the places ``tasks``, each with batches between the cuts."""
    states = []
    places = [0, *sorted(tasks), rows.num_rows]
    for start, stop in itertools.pairwise(places):
        task = copy.deepcopy(reduction)
        edges = [start, *sorted(cut for cut in cuts if start < cut < stop), stop]
        for first, last in itertools.pairwise(edges):
            task.update(rows.batch(first, last))
        states.append(task.state())
    return states


def merged(reduction: Reduction, states: Sequence[pa.Table]) -> Reduction:
    """A copy of an empty reduction with the states merged in this order."""
    result = copy.deepcopy(reduction)
    for state in states:
        result.merge(state)
    return result


def arrow_bytes(table: pa.Table) -> bytes:
    """The table in Arrow's file format."""
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


def from_arrow_bytes(content: bytes) -> pa.Table:
    return pa.ipc.open_file(io.BytesIO(content)).read_all()


def rows_of_logits(logits: Tensor, target: Tensor, **others: object) -> ScoredRows:
    """Rows with all statistics of the logits."""
    statistics = sample_statistics(logits, target)
    values = {name: value for name, value in statistics._asdict().items() if value is not None}
    values["prediction"] = logits.argmax(1)
    return ScoredRows(values, num_classes=logits.shape[1], target=target, **others)
