"""The order of an epoch: its law, its bits, its limits."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from marginops.training.samplers import order as orders
from marginops.training.samplers.order import (
    as_weights,
    epoch_order,
    random_numbers,
    repeated_order,
)

SEVERAL = 6_000  # epochs of a test of frequencies
GOLDEN = {
    "shuffle": [5, 6, 1, 2, 4, 0, 3, 7],
    "equal": [3, 2, 7],
    "weighted": [7, 5, 4, 3, 2],
    "repeated": [9, 4, 4, 9, 9],
}


def sets_by_brute_force(weights: list[float], k: int) -> dict[frozenset[int], float]:
    """The probability of each set of k draws, one after the other, by enumeration."""
    found: dict[frozenset[int], float] = {}
    for draws in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, sum(weights)
        for sample in draws:
            probability *= weights[sample] / left
            left -= weights[sample]
        found[frozenset(draws)] = found.get(frozenset(draws), 0.0) + probability
    return found


def chi_square(observed: dict, expected: dict, total: int) -> tuple[float, int]:
    assert set(observed) <= {key for key, value in expected.items() if value > 0}
    cells = [(observed.get(key, 0), value * total) for key, value in expected.items() if value > 0]
    return sum((seen - mean) ** 2 / mean for seen, mean in cells), len(cells) - 1


def assert_law(observed: dict, expected: dict, total: int) -> None:
    statistic, freedom = chi_square(observed, expected, total)
    # Five standard deviations above the mean of the chi-square distribution.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (statistic, freedom)


def count(draws: list) -> dict:
    found: dict = {}
    for draw in draws:
        found[draw] = found.get(draw, 0) + 1
    return found


@pytest.mark.parametrize(
    "weights", [[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1.0, 1.0, 0.0, 1.0], [0.01, 7.0, 0.5, 0.5, 90.0]]
)
def test_draws_follow_the_law_without_replacement(weights: list[float]) -> None:
    given_weights = as_weights(torch.tensor(weights))
    drawn = [frozenset(epoch_order(given_weights, 2, 3, e).tolist()) for e in range(SEVERAL)]
    expected = sets_by_brute_force(weights, 2)
    assert_law(count(drawn), expected, SEVERAL)
    generator = torch.Generator().manual_seed(4)
    oracle = torch.multinomial(
        torch.tensor([weights] * SEVERAL), 2, replacement=False, generator=generator
    )
    assert_law(count([frozenset(row) for row in oracle.tolist()]), expected, SEVERAL)


def test_a_wrong_law_would_be_noticed() -> None:
    weights = as_weights(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    drawn = [frozenset(epoch_order(weights, 2, 3, e).tolist()) for e in range(SEVERAL)]
    statistic, freedom = chi_square(
        count(drawn), sets_by_brute_force([1.0, 2.0, 3.0, 4.0, 6.0], 2), SEVERAL
    )
    assert statistic > freedom + 10 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0, math.inf, 1.0, 20.0]])
def test_every_order_of_the_drawn_samples_is_as_likely(weights: list[float]) -> None:
    given_weights = as_weights(torch.tensor(weights))
    drawn = [tuple(epoch_order(given_weights, 4, 5, e).tolist()) for e in range(SEVERAL)]
    assert_law(count(drawn), dict.fromkeys(itertools.permutations(range(4)), 1 / 24), SEVERAL)
    pairs = [tuple(epoch_order(given_weights, 3, 5, e).tolist()) for e in range(SEVERAL)]
    by_order = count([tuple(np.argsort(np.argsort(pair))) for pair in pairs])
    assert_law(by_order, dict.fromkeys(itertools.permutations(range(3)), 1 / 6), SEVERAL)


def test_the_exponential_variate_is_the_logarithm() -> None:
    words = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32)
    words[:8] = [0, 0, 0, 2**32 - 1, 2**32 - 1, 0, 1, 1]
    v = (words[0::2].astype(np.float64) + 0.5) * 2.0**-33
    halvings = 32 - np.array([max(int(word), 1).bit_length() for word in words[1::2]])
    expected = halvings * math.log(2) - np.log1p(-v)
    np.testing.assert_allclose(orders._exponential(words), expected, rtol=3e-7)


def test_the_exponential_variate_has_its_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    source = np.random.Philox(key=[1, 2])
    sample = orders._exponential(source.random_raw(200_000).view("<u4"))
    assert stats.kstest(sample, "expon").pvalue > 1e-3


weights_strategy = st.lists(
    st.sampled_from([0.0, 1.0, math.inf]) | st.floats(1e-30, 1e30), min_size=1, max_size=40
)


@given(weights_strategy, st.data())
def test_zero_is_never_drawn_and_infinity_always(weights: list[float], data: st.DataObject) -> None:
    tensor = torch.tensor(weights, dtype=torch.float64)
    certain, positive = int(tensor.isposinf().sum()), int((tensor > 0).sum())
    k = data.draw(st.integers(certain, positive))
    seed, epoch = data.draw(st.integers(0, 2**63 - 1)), data.draw(st.integers(0, 2**63 - 1))
    order = epoch_order(as_weights(tensor), k, seed, epoch)
    assert order.dtype == torch.int64
    assert len(order.unique()) == len(order) == k
    assert (tensor[order] > 0).all()
    assert set(tensor.isposinf().nonzero().flatten().tolist()) <= set(order.tolist())
    assert torch.equal(order, epoch_order(as_weights(tensor), k, seed, epoch))


@given(weights_strategy)
def test_normalised_weights_keep_their_ratios(weights: list[float]) -> None:
    tensor = torch.tensor(weights, dtype=torch.float64)
    normalised = as_weights(tensor)
    finite = tensor.isfinite() & (tensor > 0)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised == 0, tensor == 0)
    assert torch.equal(normalised.isposinf(), tensor.isposinf())
    if finite.any():
        expected = (tensor / tensor[finite].max())[finite].clamp(min=2.0**-100)
        torch.testing.assert_close(normalised[finite].double(), expected, rtol=1e-6, atol=0)
        assert normalised[finite].max() == 1


def test_the_bits_of_an_order_never_change() -> None:
    weights = as_weights(torch.tensor([1.0, 0.0, 2.0, torch.inf, 0.5, 3.0, 1.0, 9.0, 0.1, 4.0]))
    assert epoch_order(torch.ones(8), 8, 7, 1).tolist() == GOLDEN["shuffle"]
    assert epoch_order(torch.ones(8), 3, 7, 1).tolist() == GOLDEN["equal"]
    assert epoch_order(weights, 5, 7, 1).tolist() == GOLDEN["weighted"]
    assert repeated_order(torch.tensor([4, 9]), 5, 7, 1).tolist() == GOLDEN["repeated"]


def test_seeds_and_epochs_give_different_orders() -> None:
    orders_of = {
        tuple(epoch_order(torch.ones(50), 50, seed, epoch).tolist())
        for seed in (0, 1, 2**63 - 1)
        for epoch in (0, 1, 2, 2**63 - 1)
    }
    assert len(orders_of) == 12


def test_subsets_of_equal_weights_differ_from_the_shuffle() -> None:
    """The draw and the shuffle use different random numbers."""
    draws = _words(orders._DRAW), _words(orders._SHUFFLE), _words(orders._CHOICE)
    assert len(set(draws)) == 3


def _words(stream: int) -> tuple[int, ...]:
    return tuple(orders._words(3, 4, stream, 9).tolist())


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000])
def test_orders_of_many_samples_are_those_of_one_sort(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = orders._shuffled(size, 3, 9)
    generator = torch.Generator().manual_seed(size)
    weights = as_weights(torch.rand(size, generator=generator))
    weights[::7] = torch.inf
    weights[3::11] = 0
    k = (int(weights.isposinf().sum()) + int((weights > 0).sum())) // 2
    numbers = int(weights.isposinf().sum()), k
    few = [orders._drawn(weights.numpy(), number, 3, 9) for number in numbers]
    monkeypatch.setattr(orders, "_SORTED_AT_ONCE", 64)
    assert torch.equal(orders._shuffled(size, 3, 9), whole)
    for chosen in few:
        again = orders._drawn(weights.numpy(), len(chosen), 3, 9)
        assert torch.equal(again.sort().values, chosen.sort().values)


def test_more_samples_than_a_float_counts() -> None:
    size = 2**24 + 10
    weights = torch.zeros(size)
    weights[-5:] = 1
    assert sorted(epoch_order(weights, 5, 0, 0).tolist()) == list(range(size - 5, size))
    weights[:] = 1
    order = epoch_order(weights, 3, 0, 0)
    assert len(order.unique()) == 3


def test_flushed_subnormals_change_nothing() -> None:
    expected = epoch_order(torch.ones(5000), 5000, 1, 1), epoch_order(torch.ones(5000), 99, 1, 1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        assert torch.equal(epoch_order(torch.ones(5000), 5000, 1, 1), expected[0])
        assert torch.equal(epoch_order(torch.ones(5000), 99, 1, 1), expected[1])
    finally:
        torch.set_flush_denormal(False)


@given(st.integers(1, 9), st.integers(0, 40))
def test_repeated_orders_visit_all_in_each_pass(kept: int, length: int) -> None:
    ids = torch.arange(kept) * 10
    order = repeated_order(ids, length, 1, 2)
    assert len(order) == length
    for visits in order.split(kept):
        assert len(visits.unique()) == len(visits)
    assert set(order.tolist()) <= set(ids.tolist())


def test_passes_have_different_orders() -> None:
    passes = repeated_order(torch.arange(30), 90, 1, 2).view(3, 30)
    assert len({tuple(visits) for visits in passes.tolist()}) == 3


def test_random_numbers_are_a_choice() -> None:
    chosen = [tuple(random_numbers(4, 1, epoch).argsort().tolist()) for epoch in range(SEVERAL)]
    assert_law(count(chosen), dict.fromkeys(itertools.permutations(range(4)), 1 / 24), SEVERAL)
