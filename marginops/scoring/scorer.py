"""Scorer: the scores of a batch of rows, for any engine that maps a function over batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .. import _checks as checks
from . import columns, labels, tiles
from .errors import DataError
from .head import Source, checked_source, load_head, place_of
from .model import PlacedModel, judge_inputs
from .scored import ScoredBatch
from .statistics import checked_statistics, default_statistics


class Scorer:
    r"""The scores of batches of rows, from features and a last layer, from logits or from a model.

    A scorer is a function of a batch, and a small object that other processes can unpickle: it
    pickles to its arguments, and each process reads the head or makes the model at its first batch.
    So it fits ``ray.data.Dataset.map_batches`` and engines like it as it is.

    ``margin``, ``rival``, ``loss``, ``confidence``, ``correct``, ``el2n`` and ``gradient_norm`` are
    those of :func:`marginops.sample_statistics`. They need ``target``, and ``gradient_norm`` also
    needs ``head``. The others need no label. Let :math:`i_1, i_2` be the classes of the two largest
    logits:

    ====================== =====================================================================
    ``top2_margin``        :math:`(f_{i_1} - f_{i_2}) \, e^{-\mathrm{log\_norm}}`
    ``minimal_margin``     the distance of the features to the boundary between the two classes,
                           :math:`(f_{i_1} - f_{i_2}) / \lVert w_{i_1} - w_{i_2} \rVert_2`
                           (Weinstein et al. 2020); needs ``head``
    ``probability_margin`` :math:`p_{i_1} - p_{i_2}` of the softmax (Scheffer et al. 2001)
    ``entropy``            the entropy of the softmax, in nats
    ``prediction``         :math:`i_1`, the lowest class among equals, int64
    ====================== =====================================================================

    Args:
        head: The last layer. The path of a safetensors file or of a file of ``torch.save`` that
            holds tensors alone, for example a state dict; or a function without arguments that
            returns ``(weight [C, D], bias [C] or None)``, a :class:`torch.nn.Linear`, or a module
            with one such layer. The function stands at the top of a module, or is named by the text
            ``"MODULE:FUNCTION"``. The column then holds features. Half precision becomes float32.
        layer: The name of the layer in the file or module: ``"classifier"`` for
            ``classifier.weight``. It may be left out where there is one layer alone. Nested
            mappings have names with dots.
        model: A function without arguments, or ``"MODULE:FUNCTION"``, that returns a
            :class:`torch.nn.Module` from the values of the column to logits ``[B, C]``. It runs in
            evaluation mode without gradient, on the whole batch. If the column is numeric it gets
            one tensor, and numbers that are no integers have the dtype of the model. Otherwise it
            gets one list of values. It does not see missing rows. Without ``head`` and ``model``
            the column holds logits.
        column: The column of features or logits ``[N, D]``: float16, float32, float64, or uint16
            for the bits of bfloat16. In Arrow a ``fixed_size_list``, ``list``, ``large_list`` or
            ``fixed_shape_tensor`` of these, or a ``fixed_size_binary`` with ``dtype``.
        target: The column of labels, integers in [0, C). A row with null or ``ignore_index`` has no
            label.
        id: The column of ids, integers or strings without nulls. The scorer passes them on.
        statistics: Names of statistics. By default ``("margin",)`` with ``target``, else
            ``("minimal_margin",)`` with ``head``, else ``("top2_margin",)``.
        ignore_index: The label of rows without a label.
        log_norm: Natural logarithm of the norm product by which margins are divided, see
            :func:`marginops.classification_margin`.
        dtype: ``"float16"``, ``"bfloat16"``, ``"float32"`` or ``"float64"``: the dtype of the
            values. Only a column of ``fixed_size_binary`` needs it: its values are the bytes of
            the numbers in the order of this machine.
        device: ``"cpu"`` or ``"cuda"``, where to compute. Results are on the CPU.
        batch_rows: The number of rows of a batch in runs over files; by default it follows from the
            data.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value, or a statistic needs another
            argument.
        DataError: The file has no such layer, or NaN in it; a column is missing or has another type
            or width; a label is no class; an id is null. The constructor reads no file.

    **Rows without a label** have the values of a perfectly learnt sample: margin ``+inf``, loss,
    EL2N and gradient norm 0, confidence 1, rival 0, and they are correct. Statistics that need no
    label are those of all rows.

    **Rows that are not finite** raise no error. A row is *missing* if it is null or holds a null.
    Else it is *nan* if one of its values is NaN, *infinite* if one is infinite, which includes
    logits of ``-inf``, and *overflow* if its values are finite and one of its logits is not. All
    floating-point statistics of such a row are NaN, its ``rival`` and ``prediction`` are -1, and it
    is not ``correct``. To rank logits with masked classes, write a large negative number in place
    of ``-inf``.

    float64 values or a float64 head are computed in float64, all others in float32. The scorer
    reads the values once, in tiles of at most 2,048 rows (65,536 on CUDA) that are cut from the
    first row of the batch. Beside batch, head and results it needs one buffer for the values and
    one for the logits of a tile, of at most 16 MiB each (128 MiB on CUDA) or 16 rows. Where fewer
    than 1,024 rows of logits fit, it computes the logits of a few classes at a time, once for each
    kind of statistic, as :func:`marginops.linear_sample_statistics` does.

    The same batch gives the same bits each time, in each process of the same kind of machine with
    the same number of threads and the same libraries, wherever its memory begins. Autocast and the
    precision that :func:`torch.set_float32_matmul_precision` sets do not reach the scorer; a model
    may still use autocast inside. The same row in a batch of another size may differ in the last
    bits, because matrix products of another size may round differently.

    Example:
        >>> import numpy as np
        >>> from marginops.scoring import Scorer
        >>> scorer = Scorer(column="logits", target="label", statistics=("margin", "prediction"))
        >>> logits = np.array([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]], dtype=np.float32)
        >>> scorer({"logits": logits, "label": np.array([0, 1])})["margin"]
        array([ 1., -1.], dtype=float32)
    """

    def __init__(
        self,
        head: Source | None = None,
        *,
        layer: str | None = None,
        model: Source | None = None,
        column: str = "embedding",
        target: str | None = None,
        id: str | None = None,
        statistics: Sequence[str] | None = None,
        ignore_index: int = -100,
        log_norm: float | Tensor | None = None,
        dtype: str | None = None,
        device: str | torch.device = "cpu",
        batch_rows: int | None = None,
    ) -> None:
        if head is not None and model is not None:
            raise ValueError("model: expected None with head, got both; pass one of the two")
        if layer is not None and head is None:
            raise ValueError("layer: expected head, which holds the layer, got None")
        for name, value in {"column": column, "target": target, "id": id, "layer": layer}.items():
            if not isinstance(value, str) and (name == "column" or value is not None):
                raise TypeError(f"{name}: expected a name, got {type(value).__name__}")
        checks.check_int("ignore_index", ignore_index)
        if batch_rows is not None:
            checks.check_int("batch_rows", batch_rows, 1)
        if dtype is not None:
            checks.check_choice("dtype", dtype, [*columns.DTYPES])
            if model is not None:
                raise ValueError(
                    f"dtype: expected None with model, which gets the values as they are, got "
                    f"{dtype!r}"
                )
        self.head = None if head is None else checked_source("head", head)
        self.model = None if model is None else checked_source("model", model, allow_file=False)
        self.layer = layer
        self.column, self.target, self.id = column, target, id
        self.ignore_index, self.dtype, self.batch_rows = ignore_index, dtype, batch_rows
        self.log_norm = _checked_log_norm(log_norm)
        self.device = _checked_device(device)
        has_target, has_head = target is not None, head is not None
        names = default_statistics(has_target, has_head) if statistics is None else statistics
        self.statistics = self._checked(names)
        self._num_classes: int | None = None
        self._logits_dtype: torch.dtype | None = None
        self._head: tiles.PlacedHead | None = None
        self._model: PlacedModel | None = None

    def _checked(self, names: Any) -> tuple[str, ...]:
        names = checked_statistics(names, self.target is not None, self.head is not None)
        for argument, name in {"target": self.target, "id": self.id}.items():
            if name in names:
                raise ValueError(
                    f"{argument}: expected a column with another name than the statistics "
                    f"{', '.join(names)}, got {name!r}"
                )
        return names

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, without weights."""
        return vars(self) | {"_head": None, "_model": None}

    def __repr__(self) -> str:
        source = self.head or self.model
        of = "" if source is None else f"{place_of(source)!r}, "
        return f"Scorer({of}column={self.column!r}, statistics={self.statistics})"

    @property
    def columns(self) -> list[str]:
        """The names of the columns that it reads."""
        return [*dict.fromkeys(self._named_columns().values())]

    def _named_columns(self) -> dict[str, str]:
        """The name of each column by the argument that holds it."""
        names = {"column": self.column, "target": self.target, "id": self.id}
        return {argument: name for argument, name in names.items() if name is not None}

    @property
    def num_classes(self) -> int | None:
        """The number of classes C; None for logits and models before their first batch."""
        if self.head is not None:
            return self._loaded_head().num_classes
        return self._num_classes

    def with_statistics(self, names: Sequence[str]) -> Scorer:
        """A copy that also computes these statistics. It shares head and model."""
        result = copy.copy(self)
        result._head, result._model = self._head, self._model
        result.statistics = self._checked((*self.statistics, *names))
        return result

    def describe(self) -> dict[str, Any]:
        """What the results depend on, as JSON. The weights are there as their sha256."""
        description: dict[str, Any] = {
            "column": self.column,
            "target": self.target,
            "id": self.id,
            "statistics": [*self.statistics],
            "ignore_index": self.ignore_index,
            "log_norm": self.log_norm,
            "dtype": self.dtype,
            "device": self.device.type,
            "head": None,
            "model": None,
        }
        if self.head is not None:
            head = self._loaded_head()
            shape = [head.num_classes, head.width]
            description["head"] = {"sha256": head.head.sha256(), "shape": shape}
        if self.model is not None:
            place = place_of(self.model)
            description["model"] = {"place": place, "sha256": self._loaded_model().sha256()}
        return description

    def check_schema(self, schema: pa.Schema) -> None:
        """Check that a table of this schema has the columns, with types that fit.

        Raises:
            DataError: A column is missing, or has another type or width. The message does not name
                the file.
        """
        for argument, name in self._named_columns().items():
            columns.column_place(schema, argument, name)
        if self.model is None:
            kind = schema.field(self.column).type
            width = columns.check_type(self.column, kind, self.dtype)
            if width is not None:
                self._check_width(width)
        if self.target is not None:
            labels.check_target_type(self.target, schema.field(self.target).type)
        if self.id is not None:
            labels.check_id_type(self.id, schema.field(self.id).type)

    def __call__(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Score a batch.

        Args:
            batch: A mapping from names to arrays (NumPy, torch, lists or Arrow), a data frame, or a
                RecordBatch or Table of pyarrow.

        Returns:
            The ids and targets under the names of their columns, and each statistic under its own.
        """
        scored = self.score(batch)
        result: dict[str, np.ndarray[Any, Any]] = {}
        if self.id is not None and scored.ids is not None:
            result[self.id] = scored.ids.to_numpy(zero_copy_only=False)
        if self.target is not None and scored.target is not None:
            result[self.target] = scored.target.numpy().copy()  # it may share the batch's memory
        return result | {name: value.numpy() for name, value in scored.values.items()}

    def score(self, batch: Any, first_row: int = 0, *, features: bool = False) -> ScoredBatch:
        """Score a batch, for reductions.

        Args:
            batch: See :meth:`__call__`.
            first_row: The number of its first row among the rows of all files.
            features: Whether the result holds the values of the column, ``[B, D]``, or the logits
                of a model.

        Raises:
            DataError: See the class. A row is counted from the start of the batch.
        """
        with tiles.same_arithmetic(self.device):
            return self._score(batch, first_row, features)

    def _score(self, batch: Any, first_row: int, features: bool) -> ScoredBatch:
        column = columns.column(batch, "column", self.column)
        inputs: Tensor | list[Any] | None = None
        if self.model is None:
            width = self._num_classes if self.head is None else self._loaded_head().width
            matrix = columns.read_matrix(column, self.column, self.dtype, width)
            values, missing = matrix.values, matrix.missing
        else:
            inputs, missing = columns.read_inputs(column, self.column)
            values = self._logits(inputs, missing)
        rows = len(values)
        if rows and not values.shape[1] and missing is not None and missing.all():
            raise DataError(
                f"column: expected a value in the first rows of {self.column!r}, from which the "
                "number of classes is known, got null in all of them"
            )
        classes = self._check_width(values.shape[1]) if rows else self.num_classes or 0
        target, label, unlabelled = self._labels(batch, rows, classes)
        ids = None
        if self.id is not None:
            ids = labels.read_ids(columns.column(batch, "id", self.id), self.id)
            self._check_rows("id", self.id, len(ids), rows)
        head = None if self.head is None else self._loaded_head()
        scores = tiles.score_rows(
            values,
            label,
            unlabelled,
            self.statistics,
            head,
            self.device,
            self.log_norm,
            features,
        )
        if inputs is not None:
            judge_inputs(scores.kinds, inputs)
        is_finite, counts = tiles.finish(scores, missing)
        counts = {
            "rows": rows,
            **counts,
            "unlabelled": 0 if unlabelled is None else int(unlabelled.sum()),
        }
        return ScoredBatch(
            first_row=first_row,
            values=scores.values,
            ids=ids,
            target=target,
            ignore_index=self.ignore_index,
            features=scores.features,
            num_classes=classes,
            is_finite=is_finite,
            counts=counts,
        )

    def _labels(
        self, batch: Any, rows: int, classes: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The targets, the same in [0, C), and which rows have none (None if all have one)."""
        if self.target is None:
            return None, None, None
        column = columns.column(batch, "target", self.target)
        target = labels.read_target(column, self.target, self.ignore_index)
        self._check_rows("target", self.target, len(target), rows)
        unlabelled = target == self.ignore_index
        labels.check_classes(target, unlabelled, self.target, classes, self.ignore_index)
        if not unlabelled.any():
            return target, target, None
        return target, target.masked_fill(unlabelled, 0), unlabelled

    def _check_rows(self, argument: str, name: str, count: int, rows: int) -> None:
        if count != rows:
            raise DataError(
                f"{argument}: expected {rows} values in {name!r}, one for each row of "
                f"{self.column!r}, got {count}"
            )

    def _check_width(self, width: int) -> int:
        """Check the width of the values, and return the number of classes."""
        if self.head is not None:
            head = self._loaded_head()
            if width != head.width:
                raise DataError(
                    f"column: expected rows of {head.width} values in {self.column!r}, the width "
                    f"of the head {head.head.place}, got {width}; take the head of the network "
                    "that the rows come from"
                )
            return int(head.num_classes)
        if width < 2:
            raise DataError(
                f"column: expected logits of at least 2 classes in {self.column!r}, got {width}"
            )
        if self._num_classes not in (None, width):
            raise DataError(
                f"column: expected logits of {self._num_classes} classes as in the rows before, "
                f"got {width} in {self.column!r}"
            )
        self._num_classes = width
        return width

    def _loaded_head(self) -> tiles.PlacedHead:
        if self._head is None:
            assert self.head is not None
            self._head = tiles.PlacedHead(load_head(self.head, self.layer), self.device)
        return self._head

    def _loaded_model(self) -> PlacedModel:
        if self._model is None:
            assert self.model is not None
            self._model = PlacedModel(self.model, self.device)
        return self._model

    def _logits(self, inputs: Tensor | list[Any], missing: Tensor | None) -> Tensor:
        if not len(inputs) or (missing is not None and missing.all()):
            shape, dtype = (len(inputs), self._num_classes or 0), self._logits_dtype
            return torch.zeros(shape, dtype=dtype or torch.float32, device="cpu")
        logits = self._loaded_model().logits(inputs, missing)
        self._logits_dtype = logits.dtype
        return logits


def _checked_log_norm(log_norm: Any) -> float | None:
    if log_norm is None:
        return None
    if isinstance(log_norm, bool) or not isinstance(log_norm, int | float | Tensor):
        raise TypeError(f"log_norm: expected a number, got {type(log_norm).__name__}")
    number = float(log_norm)
    if not math.isfinite(number):
        raise ValueError(f"log_norm: expected a finite number, got {number}")
    return number


def _checked_device(device: Any) -> torch.device:
    try:
        result = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cpu or cuda, got {device!r}") from error
    if result.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    return result
