"""Trains with several samplings at several budgets, and measures the time of training."""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ... import _checks as checks


class Stopwatch:
    """Adds up the time that is spent inside ``with`` blocks.

    If something else measures the time, set the attributes instead.

    Process time is the CPU time of all threads of this process. It does not count waiting, other
    programs, or processes that this one started, such as workers of a loader. Where CUDA is in use,
    both ends of a block wait for the device.

    Attributes:
        process_seconds: The process time so far.
        wall_seconds: The time by the clock so far.

    Example:
        >>> from marginops.training import Stopwatch
        >>> stopwatch = Stopwatch()
        >>> with stopwatch:
        ...     total = sum(range(1000))
        >>> stopwatch.wall_seconds > 0
        True
    """

    def __init__(self) -> None:
        self.process_seconds = 0.0
        self.wall_seconds = 0.0
        self._started: tuple[float, float] | None = None

    def __enter__(self) -> "Stopwatch":
        if self._started is not None:
            raise RuntimeError("stopwatch: expected a stopped stopwatch, got a running one")
        _synchronize()
        self._started = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        _synchronize()
        process, wall = time.process_time(), time.perf_counter()
        assert self._started is not None
        self.process_seconds += process - self._started[0]
        self.wall_seconds += wall - self._started[1]
        self._started = None


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass(frozen=True)
class TrainingRun:
    """One training of :func:`compare`.

    Attributes:
        sampling: The name of the sampling.
        budget: The budget.
        seed: The seed.
        accuracy: The accuracy after training.
        samples: The number of back-propagated samples.
        process_seconds: The process time of training, see :class:`Stopwatch`.
        wall_seconds: The time of training by the clock.
    """

    sampling: str
    budget: float
    seed: int
    accuracy: float
    samples: float
    process_seconds: float
    wall_seconds: float


Train = Callable[[str, Any, int, Stopwatch], tuple[float, float]]


def train_all(
    train: Train,
    samplings: Sequence[str],
    budgets: Sequence[float] | Mapping[str, Sequence[float]],
    seeds: int | Sequence[int],
    warm_up: bool,
    on_run: Callable[[TrainingRun], object] | None,
) -> tuple[TrainingRun, ...]:
    """The runs of :func:`compare`."""
    if not callable(train):
        raise TypeError(f"train: expected a function, got {type(train).__name__}")
    names = _distinct("samplings", samplings, "names")
    if not isinstance(budgets, Mapping):
        budgets = dict.fromkeys(names, budgets)
    elif budgets.keys() != set(names):
        raise ValueError(f"budgets: expected the keys {names}, got {list(budgets)}")
    plan = [
        (sampling, budget)
        for sampling in names
        for budget in _distinct("budgets", budgets[sampling], "numbers")
    ]
    for _, budget in plan:
        _check_positive("budgets", budget)
    plan.sort(key=lambda pair: pair[1])
    if isinstance(seeds, int):
        checks.check_int("seeds", seeds, 1)
        seeds = range(seeds)
    seeds = _distinct("seeds", seeds, "ints")
    for seed in seeds:
        checks.check_int("seeds", seed)

    if warm_up:
        for name in names:
            _run(train, name, min(budget for other, budget in plan if other == name), seeds[0])
    runs = []
    for seed in seeds:
        for sampling, budget in plan:
            runs.append(_run(train, sampling, budget, seed))
            if on_run is not None:
                on_run(runs[-1])
    return tuple(runs)


def _run(train: Train, sampling: str, budget: float, seed: int) -> TrainingRun:
    inner, whole = Stopwatch(), Stopwatch()
    with whole:
        result = train(sampling, budget, seed, inner)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "train: expected a tuple (accuracy, number of back-propagated samples) as result, "
            f"got {type(result).__name__}"
        )
    accuracy, samples = (float(value) for value in result)
    if not math.isfinite(accuracy):
        raise ValueError(f"train: expected a finite accuracy, got {accuracy}")
    _check_positive("train: number of samples", samples)
    time = inner if inner.process_seconds or inner.wall_seconds else whole
    seconds = time.process_seconds, time.wall_seconds
    whole_samples = int(samples) if samples.is_integer() else samples
    return TrainingRun(sampling, budget, seed, accuracy, whole_samples, *seconds)


def _distinct(name: str, values: Iterable[Hashable], what: str) -> list[Any]:
    """The values as a list, if they are distinct."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected a list of {what}, got {type(values).__name__}")
    # The numbers of an array are none of Python's, which JSON needs.
    listed = values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else list(values)
    if not listed or len(set(listed)) < len(listed):
        raise ValueError(f"{name}: expected one or more distinct {what}, got {listed}")
    return listed


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value}")
