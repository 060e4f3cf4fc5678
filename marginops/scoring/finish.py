"""The end of a run: the states of all tasks become the results."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .._json import json_bytes
from .errors import DataError
from .folder import RunFolder
from .reductions.base import Reduction

if TYPE_CHECKING:
    from .plan import Plan


def finish(folder: RunFolder, plan: Plan, reductions: Sequence[Reduction]) -> dict[str, Any]:
    """Merge the states of all tasks in their order and write the results.

    Any process may call it, and several may at once: all write the same bytes. It holds the
    states of few tasks at a time.

    Args:
        folder: The folder of the run. Its tasks are finished.
        plan: The plan of the run.
        reductions: The reductions of the run, empty. They stay empty.

    Returns:
        The content of ``summary.json``.

    Raises:
        DataError: A task is not finished, or a file of it is damaged.
        OutputError: A file cannot be written.
    """
    markers = folder.markers()
    missing = sum(task.index not in markers for task in plan.tasks)
    if missing:
        raise DataError(
            f"output: expected {len(plan.tasks):,} finished tasks, got "
            f"{len(plan.tasks) - missing:,}; run the same command again"
        )
    rows: Counter[str] = Counter()
    for task in plan.tasks:
        rows.update(markers[task.index]["counts"])
    summary: dict[str, Any] = {
        "files": len(plan.files),
        "tasks": len(plan.tasks),
        "rows": dict(rows),
        "statistics": folder.description["scorer"]["statistics"],
    }
    for reduction in reductions:
        merged = copy.deepcopy(reduction)
        for state in folder.states(plan.tasks, reduction.name):
            merged.merge(state)
        folder.write_table(f"{reduction.name}.parquet", merged.result())
        summary[reduction.name] = merged.summary()
    content = json_bytes(summary)
    folder.write("summary.json", content)
    # All results are there, so whoever still writes one of them writes bytes that exist.
    folder.storage.delete_temporary_files()
    return json.loads(content)
