"""What the kernels must return: brute force in float64, one row at a time.

Only differences of logits are rounded to the dtype of the results, where they may become infinite.
Unlike brute_force.py this takes all classes of a row at once, for rows of many classes.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import brute_force

Floats = NDArray[np.float64]


def as_float64(tensor: Tensor) -> Floats:
    """The values of a tensor, exactly."""
    return tensor.double().numpy()


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
