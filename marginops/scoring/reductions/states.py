"""States of reductions as tables of Arrow."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa

from .base import Reduction

_KEY = b"marginops"


def pack(reduction: Reduction, table: pa.Table, numbers: dict[str, Any]) -> pa.Table:
    """A state: its columns, and in the metadata its numbers and what it is the state of."""
    content = {"reduction": reduction.describe(), "numbers": numbers}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return one_piece(table).replace_schema_metadata({_KEY: text})


def unpack(reduction: Reduction, state: pa.Table) -> dict[str, Any]:
    """The numbers of a state, which must be one of this reduction with the same arguments."""
    expected = f"state: expected a state of {reduction.describe()}"
    try:
        content = json.loads((state.schema.metadata or {})[_KEY])
        own, numbers = content["reduction"], content["numbers"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}, got a table without its metadata") from error
    if own != reduction.describe():
        raise ValueError(f"{expected}, got one of {own}; start again in an empty folder")
    return numbers


def one_piece(table: pa.Table) -> pa.Table:
    """The same rows without metadata, as one batch: tables of equal rows are written alike."""
    table = table.replace_schema_metadata(None)
    if table.num_rows == 0:
        return table.schema.empty_table()
    return table.combine_chunks()


def json_number(value: float) -> float | None:
    """A float for JSON, which has neither NaN nor infinities."""
    return float(value) if math.isfinite(value) else None
