"""Slow, obvious float64 definitions of every op: plain loops over Python floats."""

import math
from collections.abc import Sequence

import numpy as np


def quotient(difference: float, distance: float) -> float:
    """A distance to a boundary, where 0 / 0 is 0 and positive / 0 is infinite."""
    if distance == 0 and not math.isnan(difference):
        return 0.0 if difference == 0 else math.inf
    with np.errstate(all="ignore"):
        return float(np.float64(difference) / np.float64(distance))


def largest_two(row: Sequence[float]) -> tuple[int, int]:
    """The classes of the two largest logits, lowest class first among equals."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    return order[0], order[1]


def classification_margin(logits, target, log_norm=0.0, ignore_index=-100) -> np.ndarray:
    """f_y - max over c != y of f_c, times exp(-log_norm)."""
    margins = []
    for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        if y == ignore_index:
            margins.append(math.inf)
        elif any(math.isnan(value) for value in row):
            margins.append(math.nan)
        else:
            margin = row[y] - max(value for c, value in enumerate(row) if c != y)
            margins.append(float(np.float64(margin) * np.exp(-np.float64(log_norm))))
    return np.array(margins, dtype=np.float64)


def minimal_margin_pair(logits, weight, bias=None, rival="top2") -> tuple[list, np.ndarray]:
    """The pair of classes of every row, and its score."""
    rows = weight.double().numpy()
    if bias is not None:
        rows = np.concatenate([rows, bias.double().numpy()[:, None]], axis=1)

    def distance(i: int, j: int) -> float:
        with np.errstate(all="ignore"):
            difference = np.abs(rows[i] - rows[j])
            return float(np.linalg.norm(difference)) if len(difference) else 0.0

    pairs, scores = [], []
    for row in logits.double().tolist():
        if any(math.isnan(value) for value in row):
            pairs.append((0, 1))
            scores.append(math.nan)
            continue
        first, second = largest_two(row)
        if rival == "nearest":
            candidates = [
                (quotient(row[first] - row[j], distance(first, j)), j)
                for j in range(len(row))
                if j != first
            ]
            unknown = [j for score, j in candidates if math.isnan(score)]
            second = unknown[0] if unknown else min(candidates)[1]
        pairs.append((first, second))
        scores.append(quotient(row[first] - row[second], distance(first, second)))
    return pairs, np.array(scores, dtype=np.float64)


def select_smallest(scores: Sequence[float], k: int) -> list[int]:
    """Indices in the order of scores: by value, NaN last, equal values by index."""
    return sorted(
        range(len(scores)),
        key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else scores[i], i),
    )[:k]
