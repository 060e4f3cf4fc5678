"""Frontiers: the accuracy that a training reaches against its cost, and how two of them compare."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_GRID = 65  # accuracies over which a gain is averaged


class Gain(NamedTuple):
    """How much less a sampling costs than the baseline for the same accuracy.

    Attributes:
        value: Cost of the baseline over cost of the sampling; 2 means half the cost. It is the
            geometric mean over accuracies from ``lowest_accuracy`` to ``highest_accuracy``.
        low: The lower end of the confidence interval of ``value``; NaN for a single seed.
        high: The upper end of the confidence interval.
        lowest_accuracy: The lower end of the range of accuracies.
        highest_accuracy: The upper end of the range of accuracies.
    """

    value: float
    low: float
    high: float
    lowest_accuracy: float
    highest_accuracy: float


class Frontier:
    """Mean accuracy against mean cost. Neither falls where the budget rises.

    Where noise of seeds or of the clock makes one fall, the least-squares fit that does not fall
    (isotonic regression) takes its place. Between two budgets the accuracy is linear in the
    logarithm of the cost.

    Args:
        costs: ``[S, B]``, the cost of each seed at each budget, positive. Budgets ascend.
        accuracies: ``[S, B]``.
    """

    def __init__(self, costs: Array, accuracies: Array) -> None:
        self.log_costs: Array = np.log(_not_falling(costs.mean(0)))
        self.accuracies: Array = _not_falling(accuracies.mean(0))

    def log_cost(self, accuracies: Array) -> Array:
        """The logarithm of the smallest cost that reaches each accuracy of the frontier."""
        after = np.searchsorted(self.accuracies, accuracies).clip(0, len(self.accuracies) - 1)
        before = np.maximum(after - 1, 0)
        rise = self.accuracies[after] - self.accuracies[before]
        share = (accuracies - self.accuracies[before]) / np.where(rise > 0, rise, 1)
        start = self.log_costs[before]
        return start + np.where(rise > 0, share, 0) * (self.log_costs[after] - start)


def _not_falling(values: Array) -> Array:
    """The least-squares fit that does not fall: blocks of falling values become their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        total, count = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            before = blocks.pop()
            total, count = total + before[0], count + before[1]
        blocks.append((total, count))
    return np.concatenate([np.full(count, total / count) for total, count in blocks])


class Pair:
    """A baseline and a sampling, with all seeds and without each of the seeds.

    Args:
        baseline: Costs and accuracies of the baseline, ``[S, B]`` each.
        sampling: Costs and accuracies of the sampling, ``[S, B]`` each. Its seeds are those of the
            baseline.
    """

    def __init__(self, baseline: tuple[Array, Array], sampling: tuple[Array, Array]) -> None:
        seeds = len(baseline[0])
        subsets = [np.arange(seeds)]
        if seeds > 1:
            subsets += [np.delete(subsets[0], seed) for seed in range(seeds)]
        costs, accuracies = sampling
        self._baselines = [Frontier(*(values[rows] for values in baseline)) for rows in subsets]
        self._samplings = [Frontier(costs[rows], accuracies[rows]) for rows in subsets]
        self._points = [(np.log(costs[r].mean(0)), accuracies[r].mean(0)) for r in subsets]

    @property
    def accuracy_range(self) -> tuple[float, float]:
        """The accuracies that both frontiers have, with all seeds and without any one of them."""
        return _common_range([*self._baselines, *self._samplings])

    def gain(self, lowest: float, highest: float, confidence: float) -> Gain:
        """The gain over a range of accuracies inside ``accuracy_range``."""
        accuracies = np.linspace(lowest, highest, _GRID)
        log_gains = [
            float((baseline.log_cost(accuracies) - sampling.log_cost(accuracies)).mean())
            for baseline, sampling in zip(self._baselines, self._samplings, strict=True)
        ]
        return _gain(log_gains, lowest, highest, confidence)

    def gain_at(self, budget: int, confidence: float) -> Gain | None:
        """The gain at the accuracy of one budget; None where the baseline does not reach it."""
        reached = [float(accuracies[budget]) for _, accuracies in self._points]
        least, most = _common_range(self._baselines)
        if not least <= min(reached) <= max(reached) <= most:
            return None
        log_gains = [
            float(baseline.log_cost(np.array(accuracy)) - log_costs[budget])
            for baseline, (log_costs, _), accuracy in zip(
                self._baselines, self._points, reached, strict=True
            )
        ]
        return _gain(log_gains, reached[0], reached[0], confidence)


def _common_range(frontiers: list[Frontier]) -> tuple[float, float]:
    lowest = max(float(frontier.accuracies[0]) for frontier in frontiers)
    return lowest, min(float(frontier.accuracies[-1]) for frontier in frontiers)


def _gain(log_gains: list[float], lowest: float, highest: float, confidence: float) -> Gain:
    log_gain, width = log_gains[0], _jackknife_width(log_gains[1:], confidence)
    ends = math.exp(log_gain - width), math.exp(log_gain + width)
    return Gain(math.exp(log_gain), *ends, lowest, highest)


def _jackknife_width(without_one: list[float], confidence: float) -> float:
    """Half the width of the t interval of an estimate, from the estimates without each seed."""
    count = len(without_one)
    if count == 0:
        return math.nan
    variance = (count - 1) * float(np.var(without_one))
    return _student_quantile(count - 1, confidence) * math.sqrt(variance)


def t_width(values: Array, confidence: float = 0.95) -> Array:
    """Half the width of the t interval of the mean over the rows ``[S, B]``; NaN for one row."""
    count = len(values)
    if count == 1:
        return np.full(values.shape[1], math.nan)
    deviation = values.std(0, ddof=1)
    return _student_quantile(count - 1, confidence) * deviation / math.sqrt(count)


def _student_quantile(degrees: int, confidence: float) -> float:
    """How many standard errors a two-sided t interval extends to each side."""
    try:
        from scipy.special import stdtrit
    except ModuleNotFoundError as error:
        raise ImportError("confidence intervals need SciPy; run pip install scipy") from error
    return float(stdtrit(degrees, (1 + confidence) / 2))
