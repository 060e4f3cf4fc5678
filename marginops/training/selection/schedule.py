"""When to select, and from how many candidates."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ... import _checks as checks
from ..batches import batch_size, take
from .selection import select_batch


@dataclass(frozen=True)
class SelectionSchedule:
    """When a training loop selects, and how many candidates there are for each trained sample.

    Steps are numbered from 0 on. Where the schedule does not select, a step trains on everything.

    Attributes:
        begin: The first step that selects.
        end: The first step that does not select any more. None: selection never ends.
        every: Select at the steps ``begin``, ``begin + every``, ``begin + 2 * every`` and so on.
        candidate_ratio: The number of candidates for each trained sample, at least 1. Two numbers
            ``(first, last)`` are the ratios at ``begin`` and at ``end``, and it is linear between.

    Raises:
        TypeError, ValueError: A number has the wrong type or range, or the ratio is to change and
            there is no ``end``.

    Example:
        >>> from marginops.training import SelectionSchedule
        >>> schedule = SelectionSchedule(begin=100, end=300, candidate_ratio=(1, 5))
        >>> [schedule.ratio(step) for step in (0, 100, 200, 299, 300)]
        [1.0, 1.0, 3.0, 4.98, 1.0]
        >>> schedule.num_candidates(200, batch_size=128), schedule.num_kept(200, num_candidates=384)
        (384, 128)
    """

    begin: int = 0
    end: int | None = None
    every: int = 1
    candidate_ratio: float | tuple[float, float] = 10.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        checks.check_int("begin", self.begin, 0)
        checks.check_int("every", self.every, 1)
        if self.end is not None:
            checks.check_int("end", self.end, self.begin)
        ratio = self.candidate_ratio
        ratios = ratio if isinstance(ratio, tuple) else (ratio,)
        for value in ratios:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(
                    "candidate_ratio: expected a number or a tuple of two numbers, got "
                    f"{type(value).__name__}"
                )
            if not 1 <= value < float("inf"):
                raise ValueError(f"candidate_ratio: expected at least 1, got {value}")
        if isinstance(ratio, tuple) and len(ratio) != 2:
            raise ValueError(f"candidate_ratio: expected two numbers, got {len(ratio)}")
        if isinstance(ratio, tuple) and self.end is None:
            raise ValueError("end: expected an int for a candidate_ratio that changes, got None")

    def is_active(self, step: int) -> bool:
        """Whether step ``step`` selects."""
        checks.check_int("step", step, 0)
        has_begun = step >= self.begin and (self.end is None or step < self.end)
        return has_begun and (step - self.begin) % self.every == 0

    def ratio(self, step: int) -> float:
        """The number of candidates for each trained sample; 1 where the step does not select."""
        if not self.is_active(step):
            return 1.0
        if not isinstance(self.candidate_ratio, tuple):
            return float(self.candidate_ratio)
        assert self.end is not None
        first, last = self.candidate_ratio
        return first + (last - first) * (step - self.begin) / (self.end - self.begin)

    def num_candidates(self, step: int, batch_size: int) -> int:
        """How many candidates to draw for ``batch_size`` trained samples, rounded."""
        checks.check_int("batch_size", batch_size, 1)
        return round(batch_size * self.ratio(step))

    def num_kept(self, step: int, num_candidates: int) -> int:
        """How many of ``num_candidates`` candidates to train on, rounded, at least one."""
        checks.check_int("num_candidates", num_candidates, 1)
        return max(1, round(num_candidates / self.ratio(step)))


def keep_closest(
    network: nn.Module,
    inputs: Any,
    batch: Any,
    *,
    step: int,
    schedule: SelectionSchedule,
    **options: Any,
) -> Any:
    """The share of a batch to train on: the closest samples, as a schedule says.

    All samples of the batch run through the network once without gradient, and the share that is
    kept runs again for training. If a forward pass takes 1 and a backward pass 2, a step that keeps
    the share p takes (1 + 3 p) / 3 of a step on the whole batch: less for p < 2 / 3, that is for
    a candidate ratio above 1.5.

    Args:
        network: The network, see :func:`marginops.training.select_batch`.
        inputs: The part of ``batch`` that ``network`` takes, of the same number of samples. None
            with ``logits`` in ``options``.
        batch: The batch: inputs, targets and whatever else has one row for each sample, in any
            structure, see :func:`marginops.training.batch_size`.
        step: The number of the step, from 0 on.
        schedule: When to select. It keeps ``schedule.num_kept(step, B)`` of B samples.
        **options: More arguments of :func:`marginops.training.select_batch`. ``evaluation=False``
            scores in the mode in which the network is. Running statistics do not change either way.

    Returns:
        A batch of the structure of ``batch``, the closest sample first. If the schedule does not
        select, it is ``batch`` itself, and the network does not run.

    Raises:
        TypeError, ValueError: As :func:`marginops.training.select_batch` and
            :func:`marginops.training.take`.

    Example:
        >>> import torch
        >>> from marginops.training import SelectionSchedule, keep_closest
        >>> network = torch.nn.Linear(8, 3)
        >>> schedule = SelectionSchedule(begin=2, candidate_ratio=4)
        >>> for step in range(4):
        ...     x, y = torch.randn(128, 8), torch.randint(3, (128,))
        ...     x, y = keep_closest(network, x, (x, y), step=step, schedule=schedule)
        ...     torch.nn.functional.cross_entropy(network(x), y).backward()
        >>> len(y)
        32
    """
    count = batch_size(batch)
    k = schedule.num_kept(step, count)
    candidates = batch_size(options.get("logits") if inputs is None else inputs)
    if candidates != count:
        raise ValueError(
            f"inputs: expected {count} samples as in batch, got {candidates}; pass the inputs of "
            "this batch"
        )
    return batch if k == count else take(batch, select_batch(network, inputs, k, **options))
