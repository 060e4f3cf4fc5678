"""What a state of margins cannot be."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops.distribution import BINS, INFINITE_BIN, update_margin_distribution_op

_NEGATIVE = BINS // 2  # the bin of -0


def margin_fault(state: Mapping[str, Tensor], margins: Sequence[Tensor] | None) -> str | None:
    """What is impossible about a state of margins, "expected ..., got ...", or None.

    Args:
        state: The counts, sums and extremes.
        margins: All margins that the state should count, or None if they are not known.
    """
    state = {name: value.detach().cpu() for name, value in state.items()}
    bins, (ignored, positive) = state["bin_counts"], state["counts"].tolist()
    if (bins < 0).any():
        return f"expected bin_counts >= 0, got {bins.min().item()}"
    if ignored < 0:
        return f"expected ignored margins >= 0 in counts, got {ignored}"
    certain = int(bins[1 : INFINITE_BIN + 1].sum())
    possible = certain + int(bins[0])
    if not certain <= positive <= possible:
        return f"expected {certain} to {possible} positive margins in counts, got {positive}"
    if margins is not None:
        return _fault_of_known(state, margins)
    return _extremes_fault(state) or _sums_fault(state, positive)


def _fault_of_known(state: Mapping[str, Tensor], margins: Sequence[Tensor]) -> str | None:
    """Compare a state with that of the margins themselves."""
    own = {name: torch.zeros_like(state[name]) for name in ("bin_counts", "counts", "sums")}
    own |= {name: torch.tensor(math.inf, dtype=torch.float64) for name in ("minimum", "maximum")}
    own["maximum"].neg_()
    total = int(state["bin_counts"].sum() + state["counts"][0])
    kept = sum(len(values) for values in margins)
    if kept != total:
        return f"expected {total} margins as in the counts, got {kept}"
    for values in margins:
        update_margin_distribution_op(*own.values(), values.detach().cpu())
    for name, value in own.items():
        slack = _rounding_of_sums(own) if name == "sums" else 0
        if not torch.allclose(state[name], value, rtol=0, atol=slack, equal_nan=True):
            return f"expected {name} of the margins in the list, got other values"
    return None


def _extremes_fault(state: Mapping[str, Tensor]) -> str | None:
    bins, minimum, maximum = state["bin_counts"], state["minimum"], state["maximum"]
    has_nan = bins[INFINITE_BIN + 1 : _NEGATIVE].any() or bins[_NEGATIVE + INFINITE_BIN + 1 :].any()
    if has_nan:
        if not (minimum.isnan() and maximum.isnan()):
            return "expected minimum and maximum NaN as one margin is NaN, got numbers"
        return None
    if not bins.any():
        if not (minimum == math.inf and maximum == -math.inf):
            return (
                f"expected minimum inf and maximum -inf without margins, "
                f"got {minimum.item()} and {maximum.item()}"
            )
        return None
    # By value: the negative bins from the largest magnitude on, then the others.
    order = torch.cat((torch.arange(BINS - 1, _NEGATIVE - 1, -1), torch.arange(_NEGATIVE)))
    occupied = order[bins[order] > 0]
    for name, value, bin in (
        ("minimum", minimum, int(occupied[0])),
        ("maximum", maximum, int(occupied[-1])),
    ):
        if value.isnan() or _without_sign_of_zero(_bin_of(value)) != _without_sign_of_zero(bin):
            return f"expected a {name} in the bin {bin} of margins, got {value.item()}"
    return None


def _bin_of(margin: Tensor) -> int:
    return int(margin.float().view(torch.int32).item()) >> 16 & (BINS - 1)


def _without_sign_of_zero(bin: int) -> int:
    """0 and -0 are equal, so that either may be the minimum or maximum of both."""
    return 0 if bin == _NEGATIVE else bin


def _rounding_of_sums(state: Mapping[str, Tensor]) -> float:
    """By how much the sums of the same margins in another order may differ."""
    largest = max(abs(state["minimum"].item()), abs(state["maximum"].item()))
    slack = 1e-9 * int(state["bin_counts"].sum()) * largest
    return slack if math.isfinite(slack) else 0.0


def _sums_fault(state: Mapping[str, Tensor], positive: int) -> str | None:
    total, positive_total = state["sums"].tolist()
    count, minimum = int(state["bin_counts"].sum()), state["minimum"].item()
    maximum = state["maximum"].item()
    if math.isnan(minimum):
        return None if math.isnan(total) else f"expected a sum NaN as one margin is, got {total}"
    if count == 0:
        minimum = maximum = 0.0
    slack = _rounding_of_sums(state)
    least, largest = count * minimum - slack, count * maximum + slack
    if not least <= total <= largest:
        return f"expected a sum from {least} to {largest} for {count} margins, got {total}"
    largest = positive * max(maximum, 0.0) + slack
    if not 0 <= positive_total <= largest:
        return f"expected a sum of positive margins from 0 to {largest}, got {positive_total}"
    if total > positive_total + slack:
        return f"expected a sum of all margins of at most {positive_total}, got {total}"
    return None
