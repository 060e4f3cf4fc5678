"""Candidates: the rows that may still be among the k first of their group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from ..scored import ScoredBatch
from .states import one_piece

Array = npt.NDArray[Any]


class Candidates:
    """The k rows of each group that come first, by score, then by id, then by row.

    Scores ascend, with ``largest`` they descend. NaN comes last. Integers as ids have the order of
    their values, strings that of their UTF-8 bytes. A row without id comes after those with ids.

    The object holds at most about 2 k rows of each group, and a batch. Only when there are more,
    it leaves out those that cannot be selected. From then on it knows the k-th score of each group,
    and takes no rows behind it.

    Args:
        k: The number of rows of each group.
        score: The name of the column with the scores, float32 or float64.
        largest: Descending scores.

    Attributes:
        group: The name of the column with the groups, integers in [0, ``num_groups``). None if all
            rows are one group.
        num_groups: The number of groups.
    """

    def __init__(self, k: int, score: str, largest: bool = False) -> None:
        self.k = k
        self.score = score
        self.largest = largest
        self.group: str | None = None
        self.num_groups = 1
        self._table: pa.Table | None = None
        self._num_compact = 0  # rows of the table when it was compact
        self._limits: Array | None = None  # the largest key of each group that may be selected

    def may_select(self, scores: Array, groups: Array | None = None) -> Array:
        """Which rows may still be selected, ``[B]`` bool."""
        if self._limits is None:
            return np.ones(len(scores), dtype=bool)
        return _sort_keys(scores, self.largest) <= self._limits_of(groups)

    def add(self, rows: pa.Table) -> None:
        """Add rows: ``row``, ``id`` if there are ids, the score, the group if there are groups, and
        any other columns. All rows must have the same columns.
        """
        if self._table is None:
            self._table = one_piece(rows)
        elif rows.schema != self._table.schema:
            raise ValueError(
                f"rows: expected the columns {_listed(self._table.schema)} as before, "
                f"got {_listed(rows.schema)}"
            )
        elif rows.num_rows:
            self._table = pa.concat_tables([self._table, rows])
        if self._table.num_rows > 2 * self.k * self.num_groups:
            self._compact()

    def add_state(self, rows: pa.Table) -> None:
        """Add the rows of another object."""
        groups = None if self.group is None else rows[self.group].to_numpy()
        may_select = self.may_select(rows[self.score].to_numpy(), groups)
        self.add(rows if may_select.all() else rows.filter(pa.array(may_select)))

    def rows(self) -> pa.Table | None:
        """The selected rows in ascending order of ``row``; None before the first rows."""
        if self._table is None:
            return None
        self._compact()
        row = self._table["row"].to_numpy()
        if (row[1:] < row[:-1]).any():
            self._table = self._table.take(pa.array(np.argsort(row)))
        return one_piece(self._table)

    def ordered(self) -> pa.Table | None:
        """The selected rows, group by group, the first one first; None before the first rows."""
        table = self.rows()
        if table is None:
            return None
        keys = _sort_keys(table[self.score].to_numpy(), self.largest)
        groups = [] if self.group is None else [self.group]
        order = _order(table.append_column("key", pa.array(keys)), [*groups, "key"])
        return one_piece(table.take(order))

    def _compact(self) -> None:
        """Leave out the rows that cannot be selected."""
        table = self._table
        assert table is not None
        if table.num_rows == self._num_compact:
            return
        keys = _sort_keys(table[self.score].to_numpy(), self.largest)
        groups = None if self.group is None else table[self.group].to_numpy()
        self._limits = _last_keys(keys, groups, self.k, self.num_groups)
        limits = self._limits_of(groups)
        keep = keys <= limits
        if groups is None:
            count = np.array([np.count_nonzero(keep)])
            is_tied = keys == limits
        else:
            count = np.bincount(groups[keep], minlength=self.num_groups)
            is_tied = (keys == limits) & (count > self.k)[groups]
        if (count > self.k).any():
            tied = np.flatnonzero(is_tied)
            own_groups = np.zeros_like(tied) if groups is None else groups[tied]
            keep[self._late_ties(table, tied, own_groups, count)] = False
        self._table = one_piece(table.filter(pa.array(keep)))
        self._num_compact = self._table.num_rows

    def _limits_of(self, groups: Array | None) -> Array:
        assert self._limits is not None
        return self._limits[0] if groups is None else self._limits[groups]

    def _late_ties(self, table: pa.Table, tied: Array, groups: Array, count: Array) -> Array:
        """The rows to leave out among those with the k-th score of groups that are too large.

        Args:
            table: All rows.
            tied: The rows with the k-th score of their group.
            groups: Their groups.
            count: The number of rows of each group with the k-th score or one before it.
        """
        names = [name for name in ("id", "row") if name in table.column_names]
        some = table.select(names).take(pa.array(tied))
        order = _order(some.append_column("group", pa.array(groups)), ["group"]).to_numpy()
        tied, groups = tied[order], groups[order]
        ties = np.bincount(groups, minlength=self.num_groups)
        place = np.arange(len(tied)) - (np.cumsum(ties) - ties)[groups]
        free = self.k - (count - ties)
        return tied[place >= free[groups]]


def candidate_rows(
    scored: ScoredBatch, chosen: Array, columns: Mapping[str, Tensor | None]
) -> pa.Table:
    """A table of some rows of a batch: ``id`` if there are ids, ``row``, and other columns.

    Args:
        scored: The batch.
        chosen: ``[n]`` int64, rows of the batch.
        columns: ``[B]`` each, by name; None for a column that is left out.
    """
    table: dict[str, Any] = {}
    if scored.ids is not None:
        table["id"] = _plain_ids(scored.ids).take(pa.array(chosen))
    table["row"] = scored.first_row + chosen
    for name, values in columns.items():
        if values is not None:
            table[name] = values.numpy()[chosen]
    return pa.table(table)


def _plain_ids(ids: pa.Array) -> pa.Array:
    """Ids of one of three types, so that files with ids of several types can be merged."""
    type = ids.type
    if pa.types.is_dictionary(type):
        return _plain_ids(ids.dictionary_decode())
    if pa.types.is_signed_integer(type):
        return ids.cast(pa.int64())
    if pa.types.is_unsigned_integer(type):
        return ids.cast(pa.uint64())
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return ids.cast(pa.large_string())
    raise TypeError(f"ids: expected integers or strings, got {type}")


def _order(table: pa.Table, first: list[str]) -> pa.Array:
    """The order of rows by the columns ``first``, then ``id`` if there are ids, then ``row``."""
    names = [*first, *(name for name in ("id", "row") if name in table.column_names)]
    return pc.sort_indices(table, sort_keys=[(name, "ascending") for name in names])


def _sort_keys(scores: Array, largest: bool) -> Array:
    """Integers in the order of the scores: equal for 0 and -0, and the largest one for NaN."""
    integer = np.dtype(f"i{scores.itemsize}")
    keys = ((-scores if largest else scores) + 0.0).view(integer)  # -0.0 + 0.0 is 0.0
    top = np.iinfo(integer).max
    keys ^= (keys >> (8 * scores.itemsize - 1)) & top
    keys[np.isnan(scores)] = top
    return keys


def _last_keys(keys: Array, groups: Array | None, k: int, num_groups: int) -> Array:
    """The k-th key of each group, or the largest integer where a group has fewer."""
    last = np.full(num_groups, np.iinfo(keys.dtype).max, dtype=keys.dtype)
    if groups is None:
        if len(keys) >= k:
            last[0] = np.partition(keys, k - 1)[k - 1]
        return last
    ends = np.cumsum(np.bincount(groups, minlength=num_groups))
    places = np.concatenate(([0], ends[:-1])) + k - 1
    full = np.flatnonzero(places < ends)
    places = places[full]
    if keys.itemsize == 4:  # one integer holds both, and sorts three times as fast
        joined = np.sort((groups << 32) + keys)
        last[full] = joined[places] - (full << 32)
    else:
        last[full] = keys[np.lexsort((keys, groups))[places]]
    return last


def _listed(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
