"""What the kernels must return: brute force in float64, one row at a time.

Only differences of logits are rounded to the dtype of the results, where they may become infinite.
Unlike brute_force.py this takes all classes of a row at once, for rows of many classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers import brute_force

Floats = NDArray[np.float64]


def as_float64(tensor: Tensor) -> Floats:
    """The values of a tensor, exactly."""
    return tensor.double().numpy()


def floats(values: Sequence[float]) -> Floats:
    """Numbers as an array."""
    return np.array(values, dtype=np.float64)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of arithmetic and results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(values: Floats, dtype: torch.dtype) -> Floats:
    """Values that a dtype holds."""
    return values if dtype == torch.float64 else values.astype(np.float32).astype(np.float64)


def strongest(row: Floats, besides: int | None = None) -> int:
    """The class of the largest logit, lowest class among equals, one class left out."""
    classes = [c for c in range(len(row)) if c != besides]
    return classes[int(np.argmax(row[classes]))]


def margins(
    logits: Tensor, target: Tensor, ignore_index: int, log_norm: float | None = None
) -> Floats:
    """``(f_y - max of the others) * exp(-log_norm)``."""
    margin = brute_force.classification_margin(logits, target, ignore_index=ignore_index)
    margin = rounded(margin, logits.dtype)
    if log_norm is None:
        return margin
    scaled = margin * np.exp(-np.float64(log_norm))
    return np.where((margin == 0) | (target.numpy() == ignore_index), margin, scaled)


def rivals(logits: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int) -> list[int]:
    """The strongest wrong class: 0 for ignored rows, the lowest wrong class beside a NaN."""
    result = []
    values, own = as_float64(logits), target.tolist()
    for n in range(len(logits)) if rows is None else rows.tolist():
        if own[n] == ignore_index:
            result.append(0)
        elif np.isnan(values[n]).any():
            result.append(int(own[n] == 0))
        else:
            result.append(strongest(values[n], own[n]))
    return result


def distances_from(weight: Floats, bias: Floats | None, index: int) -> Floats:
    """``||w_index - w_c||`` for every class c, the bias as one more coordinate."""
    columns = weight if bias is None else np.concatenate((weight, bias[:, None]), 1)
    difference = columns - columns[index]
    largest = np.abs(difference).max(1, initial=0, keepdims=True)
    scale = np.where((largest > 0) & (largest < np.inf), largest, 1)
    norms: Floats = np.sqrt(((difference / scale) ** 2).sum(1)) * scale[:, 0]
    return norms


def boundary_distances(difference: Floats, distance: Floats) -> Floats:
    """``difference / distance`` where 0 / 0 is 0."""
    return np.where((difference == 0) & (distance == 0), 0, difference / distance)


def pairs(
    logits: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, nearest: bool
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Pairs of classes [K, 2], their distances [K] and the scores [K]."""
    values, columns = as_float64(logits), as_float64(weight)
    offsets = None if bias is None else as_float64(bias)
    pair, distance, score = [], [], []
    chosen = np.arange(len(logits)) if rows is None else rows.numpy()
    every, place = np.unique(chosen, return_inverse=True)  # each row once
    for n in every:
        if np.isnan(values[n]).any():
            pair.append((0, 1))
            distance.append(np.nan)
            score.append(np.nan)
            continue
        first = strongest(values[n])
        reach = distances_from(columns, offsets, first)
        difference = rounded(values[n, first] - values[n], logits.dtype)
        quotient = boundary_distances(difference, reach)
        if nearest:
            others = np.delete(np.arange(len(columns)), first)
            second = int(others[np.argmin(quotient[others])])
        else:
            second = strongest(values[n], first)
        pair.append((first, second))
        distance.append(reach[second])
        score.append(quotient[second])
    pairs_of_rows = np.array(pair, dtype=np.int64).reshape(-1, 2)
    return pairs_of_rows[place], np.array(distance)[place], np.array(score)[place]


def pair_gradients(
    key: Tensor, coefficient: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Floats, Floats]:
    """``sum of coefficient * (w_c - w_p)`` of each class c, and the sum of the magnitudes.

    The bias, or 0, is the last column. The magnitudes bound the error of rounding.
    """
    last = np.zeros(len(weight)) if bias is None else as_float64(bias)
    columns = np.concatenate((as_float64(weight), last[:, None]), 1)
    total, magnitude = np.zeros_like(columns), np.zeros_like(columns)
    for pair, factor in zip(key.tolist(), as_float64(coefficient), strict=True):
        c, p = divmod(pair, len(columns))
        total[c] += factor * (columns[c] - columns[p])
        magnitude[c] += np.abs(factor * (columns[c] - columns[p]))
    return total, magnitude


def class_sums(
    key: Tensor, coefficient: Tensor, rows: Tensor, classes: int
) -> tuple[Floats, Floats]:
    """``sum of coefficient * row`` of each class, and the sum of the magnitudes."""
    values = as_float64(rows)
    total, magnitude = np.zeros((classes, rows.shape[1])), np.zeros((classes, rows.shape[1]))
    for entry, factor in zip(key.tolist(), as_float64(coefficient), strict=True):
        c, r = divmod(entry, len(rows))
        total[c] += factor * values[r]
        magnitude[c] += np.abs(factor * values[r])
    return total, magnitude


@dataclass
class Moments:
    """What exact arithmetic says of each class; NaN for empty classes and where not finite."""

    count: NDArray[np.int64]
    mean: Floats
    radius: Floats
    reach: Floats  # the largest distance from the first row, by column


def class_moments(
    input: Tensor, target: Tensor, classes: int, normalize: bool, ignore_index: int
) -> Moments:
    """Count, mean and radius of the rows of each class, in extended precision."""
    rows, label = as_float64(input).astype(np.longdouble), target.numpy()
    if normalize:
        length = np.sqrt((rows**2).sum(1, keepdims=True))
        rows = np.where(np.isfinite(length), rows / np.where(length == 0, 1, length), np.nan)
    count = np.bincount(label[label != ignore_index], minlength=classes)
    mean, reach = np.full((2, classes, rows.shape[1]), np.nan)
    radius = np.full(classes, np.nan)
    for c in count.nonzero()[0]:
        own = rows[label == c]
        away = own - own[0]
        middle = away.mean(0)
        reach[c] = np.abs(away).max(0)
        mean[c] = own[0] + middle
        radius[c] = np.sqrt(((away - middle) ** 2).sum(1).mean())
    mean[~np.isfinite(mean)] = np.nan
    return Moments(count, mean, radius, reach)


@dataclass
class Softmax:
    """What exact arithmetic says of each row and its label; NaN without a finite maximum."""

    maximum: Floats
    log_sum: Floats
    loss: Floats
    confidence: Floats
    entropy: Floats
    el2n: Floats
    correct: list[bool]


def softmax(logits: Tensor, target: Tensor, ignore_index: int) -> Softmax:
    """Statistics of a softmax, in extended precision; ignored samples as learnt perfectly."""
    every = []
    for row, label in zip(as_float64(logits).astype(np.longdouble), target.tolist(), strict=True):
        maximum = np.nan if np.isnan(row).any() else row.max()
        first = int(np.argmax(row))
        correct = label == ignore_index or (first == label and not np.isnan(maximum))
        if label == ignore_index:
            every.append((maximum, np.nan, 0, 1, 0, 0, correct))
            continue
        if not np.isfinite(maximum):
            every.append((maximum, *5 * [np.nan], correct))
            continue
        step = row - maximum
        others = np.delete(np.exp(step), first).sum()
        log_sum = np.log1p(others)
        log_p = step - log_sum
        p = np.exp(log_p)
        entropy = -(p * np.where(p > 0, log_p, 0)).sum()
        wrong = np.delete(p, label)
        el2n = np.sqrt((wrong**2).sum() + wrong.sum() ** 2)
        every.append((maximum, log_sum, -log_p[label], p[label], entropy, el2n, correct))
    fields = list(zip(*every, strict=True)) if every else [()] * 7
    return Softmax(*(np.array(field, dtype=np.float64) for field in fields[:6]), list(fields[6]))


def shard_sums(logits: Tensor) -> tuple[Floats, Floats]:
    """The two largest logits [N, 2]; the sums of e, e * step and e * e over the others [N, 3]."""
    largest, sums = [], []
    for row in as_float64(logits).astype(np.longdouble):
        maximum = np.nan if np.isnan(row).any() else row.max()
        others = np.delete(row, strongest(row)) if np.isfinite(maximum) else row[:0]
        step = others[others > -np.inf] - maximum
        e = np.exp(step)
        largest.append((maximum, others.max(initial=-np.inf)))
        sums.append((e.sum(), (e * step).sum(), (e * e).sum()))
    two, three = np.array(largest, dtype=np.float64), np.array(sums, dtype=np.float64)
    return two.reshape(-1, 2), three.reshape(-1, 3)


def statistics_gradients(
    logits: Tensor,
    label: Sequence[int | None],
    rival: Sequence[int],
    columns: dict[str, Floats | None],
    scale: float,
) -> tuple[Floats, Floats]:
    """The gradient for the logits by its definition, and the magnitude of what is added.

    ``columns`` are the op's arguments of one value a sample; a label of None is ignored.
    """
    values = as_float64(logits).astype(np.longdouble)
    total, magnitude = np.zeros(values.shape), np.zeros(values.shape)
    dense = any(columns[f"grad_{name}"] is not None for name in ("loss", "confidence", "entropy"))
    for n, y in enumerate(label):
        if y is None:
            continue
        at = {name: 0.0 if column is None else column[n] for name, column in columns.items()}
        if dense:
            log_p = values[n] - at["maximum"] - at["log_sum"]
            p = np.exp(log_p)
            own = at["grad_loss"] - at["grad_confidence"] * at["confidence"]
            spread = np.where(p == 0, 0, at["grad_entropy"] * (log_p + at["entropy"]))
            total[n] = p * (own - spread)
            total[n, y] = np.expm1(log_p[y]) * own - p[y] * spread[y]
            conditioning = 1 + np.where(p == 0, 0, np.abs(log_p) + at["entropy"])
            parts = np.abs(at["grad_loss"]) + np.abs(at["grad_confidence"] * at["confidence"])
            magnitude[n] = p * conditioning * (parts + np.abs(at["grad_entropy"]) * conditioning)
            magnitude[n, y] += np.abs(np.expm1(log_p[y])) * parts
        margin = at["grad_margin"] * scale
        total[n, y] += margin
        total[n, rival[n]] -= margin
        magnitude[n, [y, rival[n]]] += np.abs(margin)
    return total, magnitude
