"""Slow, obvious float64 definitions of every op: plain loops over Python floats."""

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext

import numpy as np


def quotient(difference: float, distance: float) -> float:
    """The distance to a boundary: 0 / 0 is 0, and positive / 0 is infinite."""
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


def rivals(logits, target, ignore_index=-100) -> list[int]:
    """The strongest class that is not the target. In a row with a NaN, the lowest such class."""
    classes = []
    for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        if y == ignore_index:
            classes.append(0)
        elif any(math.isnan(value) for value in row):
            classes.append(int(y == 0))
        else:
            classes.append(next(c for c in largest_two(row) if c != y))
    return classes


def softmax_statistics(row: Sequence[float], y: int) -> dict[str, float]:
    """Loss, confidence, entropy and EL2N. Sums leave out the leader's 1, so nothing cancels."""
    first, _ = largest_two(row)
    largest = row[first]
    if not all(value < math.inf for value in row) or largest == -math.inf:
        return dict.fromkeys(("loss", "confidence", "entropy", "el2n"), math.nan)
    powers = [math.exp(value - largest) for value in row]
    others = math.fsum(power for c, power in enumerate(powers) if c != first)
    p = [power / (1 + others) for power in powers]
    surprise = [math.log1p(others) + (largest - value) for value in row]
    wrong = [p[c] for c in range(len(row)) if c != y]
    return {
        "loss": surprise[y],
        "confidence": p[y],
        "entropy": math.fsum(p[c] * surprise[c] for c in range(len(row)) if p[c] > 0),
        "el2n": math.hypot(math.fsum(wrong), *wrong),
    }


def sample_statistics(
    logits, target, input=None, log_norm=0.0, ignore_index=-100
) -> dict[str, np.ndarray]:
    """Every field of marginops.sample_statistics."""
    learnt = {"loss": 0.0, "confidence": 1.0, "entropy": 0.0, "el2n": 0.0, "correct": True}
    samples = []
    for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        if y == ignore_index:
            samples.append(learnt)
        else:
            correct = largest_two(row)[0] == y and not any(math.isnan(value) for value in row)
            samples.append({**softmax_statistics(row, y), "correct": correct})
    fields = {name: np.array([sample[name] for sample in samples]) for name in learnt}
    fields["margin"] = classification_margin(logits, target, log_norm, ignore_index)
    with np.errstate(over="ignore"):
        normalized = top2_margin(logits) * np.exp(-np.float64(log_norm))
    fields["top2_margin"] = np.where(target.numpy() == ignore_index, math.inf, normalized)
    fields["rival"] = np.array(rivals(logits, target, ignore_index), dtype=np.int64)
    if input is not None:
        sizes = [math.hypot(1, *features) for features in input.double().tolist()]
        fields["gradient_norm"] = fields["el2n"] * np.array(sizes)
    return fields


def row_sums(logits, target) -> tuple[list[list[float]], list[list[int]]]:
    """The values and classes of marginops::row_sums, of rows without a NaN."""
    values, classes = [], []
    for row, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        first, second = largest_two(row) if len(row) > 1 else (0, -1)
        steps = [value - row[first] for c, value in enumerate(row) if c != first]
        steps = [step for step in steps if step > -math.inf]  # neither -inf nor NaN
        values.append(
            [
                row[first],
                row[second] if second >= 0 else -math.inf,
                row[y] if 0 <= y < len(row) else 0.0,
                math.fsum(math.exp(step) for step in steps),
                math.fsum(math.exp(step) * step for step in steps),
                math.fsum(math.exp(step) ** 2 for step in steps),
            ]
        )
        classes.append([first, second])
    return values, classes


def class_sum(key, coefficient, rows, classes) -> np.ndarray:
    """[classes, D]: coefficient * row added to the class of each key, class * len(rows) + row."""
    sums = np.zeros((classes, rows.shape[1]))
    for k, value in zip(key.tolist(), coefficient.double().tolist(), strict=True):
        sums[k // len(rows)] += value * rows[k % len(rows)].double().numpy()
    return sums


def pair_distance(weight, bias, pair) -> np.ndarray:
    """The norm of the difference of two rows. The bias is one more column."""
    rows = weight.double().numpy()
    if bias is not None:
        rows = np.concatenate([rows, bias.double().numpy()[:, None]], axis=1)
    return np.array([np.linalg.norm(rows[i] - rows[j]) for i, j in pair.tolist()], dtype=np.float64)


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


def top2_margin(logits, softmax=False) -> np.ndarray:
    """The difference of the two largest logits, or of their probabilities in 60 digits."""
    margins = []
    for row in logits.double().tolist():
        first, second = largest_two(row)
        margin = row[first] - row[second]
        if any(math.isnan(value) for value in row) or math.isnan(margin):
            margin = math.nan
        elif softmax and row[first] == math.inf:
            margin = 1.0
        elif softmax:
            with localcontext() as context:
                context.prec = 60
                powers = [(Decimal(value) - Decimal(row[first])).exp() for value in row]
                margin = float((powers[first] - powers[second]) / sum(powers))
        margins.append(margin)
    return np.array(margins, dtype=np.float64)


def select_smallest(scores: Sequence[float], k: int) -> list[int]:
    """The first k indices in the order of scores: by value, NaN last, equal values by index."""
    return sorted(
        range(len(scores)),
        key=lambda i: (math.isnan(scores[i]), 0 if math.isnan(scores[i]) else scores[i], i),
    )[:k]
