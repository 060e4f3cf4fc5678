"""The minimal margin score in Triton. A program has some rows and reads them once."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def score_kernel(
    logits,
    weight,
    scores,
    rows,
    classes,
    features,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    FEATURES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    first_value = tl.full((ROWS,), float("-inf"), tl.float32)
    second_value = first_value
    first = tl.zeros((ROWS,), tl.int64)
    second = first
    for begin in range(0, classes, CLASSES):
        lane = tl.arange(0, CLASSES)
        place = row[:, None] * classes + (begin + lane)[None, :]
        mask = inside & (begin + lane < classes)[None, :]
        value = tl.load(logits + place, mask=mask, other=float("-inf")).to(tl.float32)
        top_value, top = tl.max(value, 1, return_indices=True)
        rest = tl.where(lane[None, :] == top[:, None], float("-inf"), value)
        next_value, next = tl.max(rest, 1, return_indices=True)
        beaten = top_value > first_value
        # The second class is the candidate of this block or the second class so far.
        other_value = tl.where(beaten, next_value, top_value)
        other = tl.where(beaten, next, top)
        kept_value = tl.where(beaten, first_value, second_value)
        kept = tl.where(beaten, first, second)
        second = tl.where(other_value > kept_value, begin + other, kept)
        second_value = tl.maximum(other_value, kept_value)
        first = tl.where(beaten, begin + top, first)
        first_value = tl.maximum(top_value, first_value)
    square = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, features, FEATURES):
        column = (begin + tl.arange(0, FEATURES))[None, :]
        mask = inside & (column < features)
        one = tl.load(weight + first[:, None] * features + column, mask=mask, other=0)
        other = tl.load(weight + second[:, None] * features + column, mask=mask, other=0)
        difference = one.to(tl.float32) - other.to(tl.float32)
        square += tl.sum(difference * difference, 1)
    tl.store(scores + row, (first_value - second_value) / tl.sqrt(square), mask=row < rows)


def triton_score(logits: Tensor, weight: Tensor) -> Tensor:
    """The scores of contiguous logits [N, C] and weights [C, D], without NaN."""
    rows, classes = logits.shape
    features = weight.shape[1]
    scores = torch.empty(rows, device=logits.device)
    block = min(triton.next_power_of_2(classes), 4096)
    at_once = max(1, 1024 // block)
    score_kernel[(triton.cdiv(rows, at_once),)](
        *(logits, weight, scores, rows, classes, features),
        ROWS=at_once,
        CLASSES=block,
        FEATURES=min(triton.next_power_of_2(features), 64),
        num_warps=8 if block == 4096 else 4,
    )
    return scores
