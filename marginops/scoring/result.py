"""read_result: what a finished run found, for Python and for training."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from .. import _checks as checks
from .errors import DataError
from .folder import RunFolder, part_name
from .storage import Storage

if TYPE_CHECKING:
    import pyarrow.dataset as ds

_RUN, _SUMMARY = "run.json", "summary.json"
_SELECTIONS = ("selection", "selection_per_class")
_MADE_BY = {
    "selection": "--select K or Smallest(k)",
    "selection_per_class": "--select-per-class K or SmallestPerClass(k)",
    "label_issues": "--label-issues K or SuspiciousLabels(k)",
    "margins": "Margins()",
    "moments": "--class-moments or Moments()",
}


def read_result(
    folder: str | Path,
    *,
    index: Literal["row", "id"] = "row",
    selection: Literal["selection", "selection_per_class"] | None = None,
) -> ScoringResult:
    """Read the folder of a finished run.

    Args:
        folder: The output of ``marginops score`` or :func:`score_files`, a path or URL.
        index: What the indices of your data set are. ``"row"``: the numbers of the rows through
            all files of the run, as in a data set that reads the same files in the same order.
            ``"id"``: the integers of the id column.
        selection: Which rows are kept, if the run has both kinds of selection.

    Returns:
        :class:`ScoringResult`.

    Raises:
        DataError: The folder holds no run, the run is not finished, or a file is damaged.
        ValueError: ``index`` or ``selection`` is none of the names.

    Example:
        >>> import tempfile
        >>> import pyarrow as pa
        >>> from pyarrow.parquet import write_table
        >>> from marginops.scoring import Scorer, Smallest, read_result, score_files
        >>> folder = tempfile.mkdtemp()
        >>> logits = pa.array([[3.0, 0.0], [0.1, 0.0], [0.0, 2.0]], pa.list_(pa.float32(), 2))
        >>> write_table(pa.table({"logits": logits}), f"{folder}/data.parquet")
        >>> scorer = Scorer(column="logits")
        >>> _ = score_files(folder, scorer, f"{folder}/run", reductions=[Smallest(2)], workers=1)
        >>> result = read_result(f"{folder}/run")
        >>> result.indices, result.weights()
        (tensor([1, 2]), tensor([0., 1., 1.]))
    """
    checks.check_choice("index", index, ("row", "id"))
    if selection is not None:
        checks.check_choice("selection", selection, _SELECTIONS)
    storage = Storage(folder)
    description = _read_json(storage, _RUN)
    if description is None:
        raise DataError(
            f"folder: expected the output of marginops score, got {folder} without run.json"
        )
    summary = _read_json(storage, _SUMMARY)
    if summary is None:
        done = len(RunFolder(storage, description).finished())
        raise DataError(
            f"folder: expected a finished run, got {folder} with {done:,} finished tasks and no "
            "summary.json; run the same command again"
        )
    for name in ("files", "tasks", "rows", "statistics"):
        if name not in summary:
            raise _damaged(storage, _SUMMARY, f"no {name}")
    return ScoringResult(storage, description, summary, index, selection)


class ScoringResult:
    """What a run found. Tables are read when they are asked for. Make one with :func:`read_result`.

    Attributes:
        summary: The content of ``summary.json``: the numbers of files, tasks and rows, the names
            of the statistics, and the numbers of each reduction under its name.
        num_rows: The number of rows of all files.
    """

    def __init__(
        self,
        storage: Storage,
        description: dict[str, Any],
        summary: dict[str, Any],
        index: str,
        selection: str | None,
    ) -> None:
        self.summary = summary
        self.num_rows: int = summary["rows"]["rows"]
        self._storage, self._description = storage, description
        self._index, self._selection = index, selection

    @functools.cached_property
    def selection(self) -> pa.Table:
        """The kept rows, a line for each.

        The columns are ``id`` if the run has ids, ``row``, the score under the name of its
        statistic, and ``target`` and ``prediction`` where they are known. The line with the
        smallest score comes first; of a selection per class, that of the first class.

        Raises:
            DataError: The run selected nothing, or both ways and :func:`read_result` was not told
                which one to take. Or the file is damaged.
        """
        found = [name for name in _SELECTIONS if name in self.summary]
        if self._selection is None and len(found) == 2:
            raise DataError(
                f"selection: expected a run with one selection, got {' and '.join(found)}; call "
                f"read_result(folder, selection={found[0]!r})"
            )
        return self._table(self._selection or (found[0] if found else "selection"))

    @property
    def label_issues(self) -> pa.Table:
        """The most suspicious labels, see :class:`SuspiciousLabels`."""
        return self._table("label_issues")

    @property
    def margins(self) -> pa.Table:
        """The distribution of the margins, see :class:`Margins`."""
        return self._table("margins")

    @property
    def moments(self) -> pa.Table:
        """The moments of the classes, see :class:`Moments`."""
        return self._table("moments")

    @functools.cached_property
    def indices(self) -> Tensor:
        """The kept samples in the order of ``selection``, int64.

        They fit ``torch.utils.data.Subset(dataset, indices)``, ``dataset.select(indices)`` of
        Hugging Face, and ``MarginSampler(dynamics, subset=indices)``.

        Raises:
            DataError: As for ``selection``; or ``index="id"``, and the run has no integers as ids.
        """
        table = self.selection
        if self._index not in table.column_names:
            raise DataError(
                'index: expected a run with ids for "id", got one without; read the result with '
                'index="row"'
            )
        column = table[self._index]
        if not pa.types.is_integer(column.type):
            raise DataError(
                f'index: expected integers as ids for "id", got {column.type}; read the result '
                'with index="row", and the ids with result.selection["id"]'
            )
        if column.null_count:
            raise DataError(
                f'index: expected an id for each kept row with "id", got {column.null_count:,} '
                'rows without; read the result with index="row"'
            )
        try:
            return torch.from_numpy(column.cast(pa.int64()).to_numpy().copy())
        except pa.ArrowInvalid as error:
            raise DataError(
                f'index: expected ids below 2**63 for "id", got an error: {error}'
            ) from error

    def weights(self, num_samples: int | None = None) -> Tensor:
        """Weights for :class:`marginops.training.WeightedSampler`: 1 for kept samples, else 0.

        Args:
            num_samples: N, the size of the data set. The default is the number of rows of the run.

        Returns:
            ``[N]`` float32.

        Raises:
            DataError: As for ``indices``.
            ValueError: A kept sample has an index outside [0, N).
        """
        if num_samples is None:
            num_samples = self.num_rows
        checks.check_int("num_samples", num_samples, 1)
        kept = self.indices
        if len(kept) and not (kept.min() >= 0 and kept.max() < num_samples):
            raise ValueError(
                f"num_samples: expected a data set that has the kept samples {int(kept.min())} to "
                f"{int(kept.max())}, got {num_samples} samples"
            )
        weights = torch.zeros(num_samples, dtype=torch.float32)
        weights[kept] = 1
        return weights

    def scores(self) -> ds.Dataset:
        """The scores of all rows, in the order of the files.

        Returns:
            ``pyarrow.dataset.Dataset`` with a line for each row: ``id`` and ``target`` where the
            run has them, and the statistics. ``to_batches(columns=...)`` reads it piece by piece,
            and ``to_table(filter=...)`` reads some of the rows.

        Raises:
            DataError: The run has no scores of all rows, or their files are damaged.
        """
        if not self._description.get("scores", True):
            raise DataError(
                "scores: expected a run with scores of all rows, got one without; run without "
                "--no-scores in a new folder"
            )
        tasks = self.summary["tasks"]
        missing = set(range(tasks)) - RunFolder(self._storage, self._description).finished()
        if missing:
            raise DataError(
                f"scores: expected the files of {tasks:,} tasks, got {tasks - len(missing):,}; "
                f"{self._storage.full_name(part_name(min(missing)))} is missing or has another "
                "size than its marker says; run the same command again"
            )
        import pyarrow.dataset as ds  # imports pandas, which takes time and memory in each worker

        paths = [f"{self._storage.path}/{part_name(task)}" for task in range(tasks)]
        try:
            return ds.dataset(paths, filesystem=self._storage.filesystem, format="parquet")
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self._storage, part_name(0), error) from error

    def _table(self, name: str) -> pa.Table:
        if name not in self.summary:
            raise DataError(
                f"{name}: expected a run with {_MADE_BY[name]}, got one without; run it in a new "
                "folder"
            )
        file_name = f"{name}.parquet"
        try:
            with self._storage.open_input(file_name) as file:
                return pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self._storage, file_name, error) from error

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._storage.location!r}, num_rows={self.num_rows})"


def _read_json(storage: Storage, name: str) -> dict[str, Any] | None:
    """A JSON file of a run; None if there is no such file."""
    try:
        content = storage.read(name)
        found = None if content is None else json.loads(content)
    except (OSError, ValueError) as error:
        raise _damaged(storage, name, error) from error
    if found is not None and not isinstance(found, dict):
        raise _damaged(storage, name, f"{type(found).__name__} instead of an object")
    return found


def _damaged(storage: Storage, name: str, reason: object) -> DataError:
    remedy = "run in a new folder" if name == _RUN else "delete it and run the same command again"
    return DataError(
        f"{storage.full_name(name)}: expected a file of a finished run, got an error: "
        f"{' '.join(str(reason).split())}; {remedy}"
    )
