"""What a sampling gains over uniform batches, for claims about the cost of equal accuracy."""

from typing import Literal

from marginops.training import Comparison

from .statistics import Interval

Cost = Literal["samples", "process_seconds"]


def gain(comparison: Comparison, sampling: str, cost: Cost) -> Interval | None:
    """The cost of uniform batches over that of a sampling; None without a common accuracy."""
    lowest, highest = comparison.accuracy_range(sampling, cost)
    if lowest > highest:
        return None
    return Interval(*comparison.gain(sampling, cost=cost)[:3])


def range_text(comparison: Comparison, sampling: str) -> str:
    """The accuracies that are compared, in percent."""
    lowest, highest = comparison.accuracy_range(sampling, "samples")
    return f"{100 * lowest:.1f} to {100 * highest:.1f}"
