"""Rank correlations, over all samples or within groups, with intervals of the bootstrap."""

from collections.abc import Callable, Sequence

import numpy as np

from .statistics import RESAMPLES, Interval

Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]


def spearman(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Spearman's correlation along the last axis; NaN for constants."""
    from scipy.stats import rankdata

    return _pearson(rankdata(first, axis=-1), rankdata(second, axis=-1))


def kendall(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    """Kendall's tau-b along the last axis; NaN for constants."""
    pairs = [np.sign(values[..., None] - values[..., None, :]) for values in (first, second)]
    one, other = (signs.reshape(*signs.shape[:-2], -1) for signs in pairs)
    with np.errstate(invalid="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


def correlation_interval(
    correlation: Correlation, first: Sequence[float], second: Sequence[float]
) -> Interval:
    """A correlation with the 95 % percentile interval of the paired bootstrap."""
    from scipy.stats import bootstrap

    samples = np.asarray(first, float), np.asarray(second, float)
    found = bootstrap(
        samples,
        correlation,
        n_resamples=RESAMPLES,
        batch=500,
        paired=True,
        vectorized=True,
        method="percentile",
        random_state=0,
    )
    return _interval(correlation(*samples), found.bootstrap_distribution)


def interval_within(
    first: Sequence[float], second: Sequence[float], groups: Sequence[float]
) -> Interval:
    """Spearman's correlation within groups: of ranks in the own group, less their mean.

    The bootstrap draws samples anew within each group.
    """
    samples = np.asarray(first, float), np.asarray(second, float)
    labels = np.asarray(groups)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    generator = np.random.default_rng(0)
    drawn = [generator.choice(group, (RESAMPLES, len(group))) for group in members]
    return _interval(_within(*samples, members), _within(*samples, drawn))


def _within(first: np.ndarray, second: np.ndarray, members: list[np.ndarray]) -> np.ndarray:
    """The correlation over groups, which are indices along the last axis."""
    from scipy.stats import rankdata

    def ranks(values: np.ndarray) -> np.ndarray:
        parts = [rankdata(values[index], axis=-1) for index in members]
        return np.concatenate([part - part.mean(-1, keepdims=True) for part in parts], axis=-1)

    return _pearson(ranks(first), ranks(second))


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The linear correlation along the last axis; NaN for constants."""
    first = first - first.mean(-1, keepdims=True)
    second = second - second.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))


def _interval(value: np.ndarray, resampled: np.ndarray) -> Interval:
    """The quantiles of the resamples that are no constants."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))
