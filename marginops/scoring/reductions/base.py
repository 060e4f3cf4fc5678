"""Reduction: what every reduction of scored rows can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from ..scored import ScoredBatch

if TYPE_CHECKING:
    import pyarrow as pa


class Reduction(ABC):
    """A summary of scored rows whose parts can be merged.

    A new object is empty. Each task fills an object of its own, and :meth:`merge` adds the states
    of all tasks in their order. So the result does not depend on who scored which task.

    A subclass is picklable, and ``copy.deepcopy`` of an empty object is another empty one.
    """

    name: ClassVar[str]
    """The name of its files and of its part of the summary."""

    needs_target: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    @property
    @abstractmethod
    def statistics(self) -> tuple[str, ...]:
        """The statistics that it reads."""

    def resolved(self, default: str, *, has_target: bool = False) -> Reduction:
        """An empty copy that reads a default statistic where the user named none.

        Args:
            default: The first statistic of the scorer.
            has_target: The rows have labels.
        """
        return self

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its class and arguments, as JSON. Parts with different ones cannot be merged."""

    @abstractmethod
    def update(self, scored: ScoredBatch) -> None:
        """Add a batch. Batches come in the order of their rows."""

    @abstractmethod
    def state(self) -> pa.Table:
        """Everything so far. What is no column stands in the metadata of the schema, as JSON.

        The same content gives the same bytes in Arrow's file format.
        """

    @abstractmethod
    def merge(self, state: pa.Table) -> None:
        """Add the state of later rows.

        Raises:
            ValueError: It is the state of another reduction, or of one with other arguments.
        """

    @abstractmethod
    def result(self) -> pa.Table:
        """The table for the user."""

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """The numbers for the user, as JSON. What is no finite number is None."""
