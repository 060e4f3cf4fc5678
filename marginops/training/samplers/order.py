"""The order of an epoch: draws without replacement, a pure function of seed, epoch and weights."""

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...ops.select import select_smallest

# The numbers come from Philox 4x64 (Salmon et al., 2011) with (seed, epoch) as its key. A stream is
# a part of its counter. NumPy promises that raw numbers never change, and all arithmetic below is
# +, -, *, / of IEEE 754. So an order has the same bits on every machine.
_DRAW, _SHUFFLE, _CHOICE = 0, 1, 2
_PIECE = 1 << 15  # samples whose arrays stay in the cache
_SORTED_AT_ONCE = 1 << 24  # beyond this, a sort would need too much memory
_LN2 = np.float32(np.log(2.0))

_Floats = NDArray[np.float32]


def epoch_order(weights: Tensor, k: int, seed: int, epoch: int) -> Tensor:
    """The samples of an epoch in the order of their visits.

    An exponential race draws them: sample i arrives at the time ``-log(u_i) / w_i``, and the first
    k arrivals are drawn. This is the law of k draws one after the other without replacement, each
    in proportion to the weights of what is left (Efraimidis & Spirakis, 2006). A shuffle follows,
    because heavy samples arrive early.

    Args:
        weights: ``[N]`` float32 from :func:`as_weights`.
        k: How many samples to draw. It is at most the number of positive weights.
        seed: 0 <= seed < 2**63.
        epoch: 0 <= epoch < 2**63.

    Returns:
        ``[k]`` int64 on the CPU, no id twice.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if k == len(weights):  # every weight is positive
        return _shuffled(k, seed, epoch)
    chosen = _drawn(weights.numpy(), k, seed, epoch)
    return chosen.index_select(0, _shuffled(k, seed, epoch))


def _drawn(weights: _Floats, k: int, seed: int, epoch: int) -> Tensor:
    """The certain samples, and then those that arrive first; among equal times lower ids first."""
    certain = torch.from_numpy(np.flatnonzero(np.isposinf(weights)))
    k -= len(certain)
    keys = _race(weights, seed, epoch)
    if len(keys) <= _SORTED_AT_ONCE:
        return torch.cat([certain, select_smallest(torch.from_numpy(keys), k).indices])
    if k == 0:
        return certain
    times = keys[np.flatnonzero(keys < np.inf)]  # a partition is slow where many are equal
    times.partition(k - 1)
    last = times[k - 1]
    del times
    earlier = np.flatnonzero(keys < last)
    equal = np.flatnonzero(keys == last)[: k - len(earlier)]
    return torch.cat([certain, torch.from_numpy(earlier), torch.from_numpy(equal)])


def repeated_order(ids: Tensor, length: int, seed: int, epoch: int) -> Tensor:
    """Passes over ``ids``, each in an order of its own, with ``length`` visits in all."""
    passes = -(-length // len(ids))
    keys = torch.from_numpy(_uniform_keys(seed, epoch, _SHUFFLE, passes * len(ids)))
    order = keys.view(passes, len(ids)).sort(dim=1, stable=True).indices
    return ids[order.flatten()[:length]]


def random_numbers(count: int, seed: int, epoch: int) -> Tensor:
    """Random positive numbers ``[count]`` float32, for a choice of samples at random."""
    return torch.from_numpy(_uniform_keys(seed, epoch, _CHOICE, count))


def as_weights(weights: Tensor) -> Tensor:
    """Weights as float32 on the CPU, of which the largest finite one is 1.

    A positive weight below 2**-100 of the largest one becomes 2**-100, so that it stays positive
    and arrival times stay finite.
    """
    weights = weights.detach().cpu()
    if weights.dtype != torch.float64:
        weights = weights.float()
    finite = weights[weights.isfinite()]
    scale = finite.max().item() if len(finite) else 0.0
    result = weights.float() if scale in (0.0, 1.0) else (weights / scale).float()
    return torch.where(weights > 0, result.clamp(min=2.0**-100), 0.0)


def _words(seed: int, epoch: int, stream: int, count: int) -> NDArray[np.uint32]:
    """``count`` random words of 32 bits."""
    source = np.random.Philox(key=[seed, epoch], counter=[0, stream, 0, 0])
    raw = source.random_raw((count + 1) // 2)
    return raw.astype("<u8", copy=False).view("<u4")[:count]


def _uniform_keys(seed: int, epoch: int, stream: int, count: int) -> _Floats:
    """Random positive floats, whose order is that of 30 random bits."""
    words = _words(seed, epoch, stream, count)
    words >>= np.uint32(2)
    words += np.uint32(1 << 23)  # no subnormal number: torch can be told to flush them to 0
    return words.view(np.float32)


def _race(weights: _Floats, seed: int, epoch: int) -> _Floats:
    """The time at which each sample arrives: inf if it is certain or never comes."""
    others = (weights == 0) | np.isposinf(weights)
    if np.all((weights == 1) | others):  # then the logarithm changes no order
        keys = _uniform_keys(seed, epoch, _DRAW, len(weights))
    else:
        keys = _exponential_race(weights, seed, epoch)
    # Positive floats are ordered as their bits are. A maximum needs no branch.
    bits = keys.view(np.uint32)
    np.maximum(bits, others * np.float32(np.inf).view(np.uint32), out=bits)
    return keys


def _exponential_race(weights: _Floats, seed: int, epoch: int) -> _Floats:
    source = np.random.Philox(key=[seed, epoch], counter=[0, _DRAW, 0, 0])
    keys = np.empty_like(weights)
    for begin in range(0, len(weights), _PIECE):
        piece = weights[begin : begin + _PIECE]
        words = source.random_raw(len(piece)).astype("<u8", copy=False).view("<u4")
        with np.errstate(divide="ignore"):
            np.divide(_exponential(words), piece, out=keys[begin : begin + _PIECE])
    return keys


def _exponential(words: NDArray[np.uint32]) -> _Floats:
    """An exponential variate from every two words: ``-log(u) = halvings * log 2 - log(1 - v)``.

    ``halvings`` is the number of leading zeros of the second word, and v in (0, 0.5] comes from the
    first. So small variates have full relative precision. The series of ``-log(1 - v)``, which is
    ``2 artanh(v / (2 - v))``, is exact to 2e-8.
    """
    v = (words[0::2].astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-33)
    exponent = (words[1::2] | np.uint32(1)).astype(np.float64).view(np.int64) >> 52
    halvings = (1023 + 31 - exponent).astype(np.float32)
    s = v / (np.float32(2) - v)
    square = s * s
    series = np.full_like(s, 1 / 13)
    for denominator in (11, 9, 7, 5, 3, 1):
        series *= square
        series += np.float32(1 / denominator)
    series *= s
    series += series
    halvings *= _LN2
    return series + halvings


def _shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """A random order of 0, ..., count - 1: the order of random keys."""
    keys = _uniform_keys(seed, epoch, _SHUFFLE, count)
    if count <= _SORTED_AT_ONCE:
        return select_smallest(torch.from_numpy(keys), count).indices
    # The keys of one part are below those of the next. So the parts make up the order of the whole.
    order, begin = torch.empty(count, dtype=torch.int64, device="cpu"), 0
    parts = -(-count // (_SORTED_AT_ONCE // 2))
    bounds = np.linspace(1 << 23, (1 << 23) + (1 << 30), parts + 1).astype(np.uint32)
    for low, high in itertools.pairwise(bounds.view(np.float32)):
        positions = np.flatnonzero((keys >= low) & (keys < high))
        in_order = select_smallest(torch.from_numpy(keys[positions]), len(positions)).indices
        order[begin : begin + len(positions)] = torch.from_numpy(positions)[in_order]
        begin += len(positions)
    return order
