"""Means over seeds, and intervals of paired differences and ratios by the bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval, whose ends are NaN for a single value."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2, scale: float = 1) -> str:
        """The three numbers, multiplied by ``scale``: ``1.52 (1.34 to 1.73)``."""
        value, low, high = (
            f"{scale * number:.{digits}f}" for number in (self.value, self.low, self.high)
        )
        return value if low == "nan" else f"{value} ({low} to {high})"


def mean_sd(values: Sequence[float], digits: int = 2, scale: float = 1) -> str:
    """Mean and standard deviation of a sample, multiplied by ``scale``: ``88.93 ± 0.21``."""
    numbers = scale * np.asarray(values, float)
    if len(numbers) < 2:
        return f"{numbers.mean():.{digits}f}"
    return f"{numbers.mean():.{digits}f} ± {numbers.std(ddof=1):.{digits}f}"


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of ``second - first``, pair by pair, with its bootstrap interval."""
    return mean_interval(np.asarray(second, float) - np.asarray(first, float))


def paired_ratio(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The geometric mean of ``second / first``, pair by pair, with its bootstrap interval."""
    logs = mean_interval(np.log(np.asarray(second, float)) - np.log(np.asarray(first, float)))
    return Interval(*np.exp([logs.value, logs.low, logs.high]).tolist())


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean with its 95 % interval of the bootstrap over the values.

    The percentile interval of few values is too narrow. So its percentiles are those that make it
    as wide as the interval of Student's t for normal values (the expanded percentile interval of
    Hesterberg 2015).
    """
    from scipy.stats import bootstrap, norm, t

    numbers = np.asarray(values, float)
    mean, count = float(numbers.mean()), len(numbers)
    if count < 2:
        return Interval(mean, math.nan, math.nan)
    if np.ptp(numbers) == 0:
        return Interval(mean, mean, mean)
    tail = norm.cdf(-math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1))
    means = bootstrap(
        (numbers,), np.mean, n_resamples=RESAMPLES, method="percentile", random_state=0
    ).bootstrap_distribution
    low, high = np.quantile(means, (tail, 1 - tail))
    return Interval(mean, float(low), float(high))
