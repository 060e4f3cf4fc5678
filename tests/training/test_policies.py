"""Policies: which samples they prefer, beside definitions in plain Python."""

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from helpers.seen import see, seen
from marginops.training import (
    BelowMeanLoss,
    BetaWindow,
    MarginSampler,
    RankPower,
    SmallestMargins,
    Strata,
    TrainingDynamics,
    Uniform,
)
from marginops.training.samplers.class_floor import rank_within_class
from marginops.training.samplers.strata import order_weights

N = 200
MARGINS = torch.randn(N, generator=torch.Generator().manual_seed(3)) * 2
ALL: list[Any] = [
    SmallestMargins(),
    SmallestMargins(0.3, random_share=0.0, skip_hardest=0.2),
    Uniform(0.5),
    BelowMeanLoss(),
    Strata(0.3, skip_hardest=0.1),
    BetaWindow(0.3),
    BetaWindow(0.3, a=0.5, b=40.0),
    RankPower(0.3),
    RankPower(0.3, power=20.0),
]


def weights_of(policy: Any, dynamics: TrainingDynamics, k: int) -> Tensor:
    weights = policy(dynamics, k, None)
    assert weights.dtype == torch.float32
    assert weights.shape == (dynamics.num_samples,)
    assert (weights >= 0).all()
    return weights


def frequencies(policy: Any, dynamics: TrainingDynamics, epochs: int) -> Tensor:
    sampler = MarginSampler(dynamics, policy)
    visits = torch.zeros(dynamics.num_samples)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        visits[list(sampler)] += 1
    return visits / epochs


margins_strategy = st.lists(
    st.floats(-5, 5, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0]),
    min_size=1,
    max_size=30,
)


@given(margins_strategy, st.sampled_from(ALL), st.data())
def test_every_policy_gives_enough_weights(
    margins: list[float], policy: Any, data: st.DataObject
) -> None:
    """Whatever the margins are, k samples can be drawn. Unseen samples do not matter."""
    dynamics = TrainingDynamics(len(margins) + 3)
    see(dynamics, range(len(margins)), margins)
    most = math.floor(len(margins) * (1 - (0.2 if getattr(policy, "skip_hardest", 0) else 0)))
    k = data.draw(st.integers(min(1, most), most))
    if k == 0:
        return
    weights = weights_of(policy, dynamics, k)[: len(margins)]
    assert int((weights > 0).sum()) >= k
    assert int(weights.isposinf().sum()) <= k


@given(margins_strategy, st.integers(1, 30), st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_smallest_margins_are_certain(margins: list[float], k: int, share: float) -> None:
    k = min(k, len(margins))
    weights = weights_of(SmallestMargins(random_share=share), seen(margins), k)
    numbers = [index for index, margin in enumerate(margins) if math.isfinite(margin)]
    numbers.sort(key=lambda index: margins[index])
    expected = numbers[: k - math.floor(share * k + 0.5)]
    assert weights.isposinf().nonzero().flatten().tolist() == sorted(expected)
    finite = weights[~weights.isposinf()]
    assert (finite == (0 if share == 0 and len(expected) == k else 1)).all()


@pytest.mark.parametrize(
    ("by", "sign"),
    [
        *(("margin", 1), ("margin_average", 1), ("aum", 1), ("confidence", 1), ("score", 1)),
        *(("correctness", 1), ("loss", -1), ("el2n", -1), ("variability", -1), ("forgetting", -1)),
    ],
)
def test_a_policy_goes_by_any_read_out(by: str, sign: int) -> None:
    dynamics = seen(MARGINS)
    see(dynamics, range(N), (MARGINS.flip(0) * 3).tolist())
    weights = weights_of(SmallestMargins(by=by, random_share=0.0), dynamics, 30)
    values = getattr(dynamics, by).float() * sign
    expected = values.sort(stable=True).indices[:30]
    assert weights.isposinf().nonzero().flatten().tolist() == sorted(expected.tolist())


def test_a_policy_goes_by_a_tensor_or_a_function() -> None:
    values = torch.arange(N, 0, -1, dtype=torch.float64)
    dynamics = TrainingDynamics(N)
    see(dynamics, range(N - 1), MARGINS[:-1].tolist())
    for by in (values, lambda d: values if d is dynamics else None):
        weights = weights_of(SmallestMargins(by=by, random_share=0.0), dynamics, 5)
        # The last sample has the smallest number, but was never seen.
        assert weights.nonzero().flatten().tolist() == list(range(N - 6, N - 1))


def test_the_hardest_are_left_out() -> None:
    hard = set(MARGINS.argsort()[:40].tolist())
    for skip in (0.2, lambda dynamics: 0.2):
        policy = SmallestMargins(0.3, skip_hardest=skip)
        visited = frequencies(policy, seen(MARGINS), 30)
        assert set((visited == 0).nonzero().flatten().tolist()) >= hard
        assert (visited[MARGINS.argsort()[40:88]] == 1).all()


def test_the_hardest_are_told_by_their_own_number() -> None:
    noise = torch.arange(N, dtype=torch.float32)
    policy = SmallestMargins(0.3, random_share=0.0, skip_hardest=0.5, skip_by=noise)
    weights = weights_of(policy, seen(MARGINS), 60)
    assert (weights[:100] == 0).all()
    expected = MARGINS[100:].argsort()[:60] + 100
    assert sorted(weights.nonzero().flatten().tolist()) == sorted(expected.tolist())


def test_a_share_to_skip_that_leaves_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^skip_hardest: expected a "):
        SmallestMargins(0.3, skip_hardest=lambda dynamics: 1.2)(seen(MARGINS), 60, None)
    with pytest.raises(ValueError, match=r"that leaves 100 of 200 seen samples, got 0.6; lower it"):
        SmallestMargins(0.3, skip_hardest=0.6)(seen(MARGINS), 100, None)


def test_what_a_function_skips_leaves_enough() -> None:
    weights = SmallestMargins(0.3, skip_hardest=lambda dynamics: 0.8)(seen(MARGINS), 60, None)
    assert weights.nonzero().flatten().tolist() == MARGINS.argsort()[140:].sort().values.tolist()


def test_below_the_mean_loss_is_a_random_part() -> None:
    dynamics = seen(MARGINS)
    hard = dynamics.loss >= dynamics.loss.double().mean()
    weights = weights_of(BelowMeanLoss(), dynamics, 140)
    assert torch.equal(weights.isposinf(), hard)
    assert (weights[~hard] == 1).all()
    assert 20 < int(hard.sum()) < 140
    visited = frequencies(BelowMeanLoss(0.7), dynamics, 400)
    share = (140 - int(hard.sum())) / int((~hard).sum())
    assert (visited[hard] == 1).all()
    assert (visited[~hard] - share).abs().max() < 5 * math.sqrt(share * (1 - share) / 400)
    few = weights_of(BelowMeanLoss(), dynamics, int(hard.sum()))
    assert (few == 1).all()


@pytest.mark.parametrize(
    "probability",
    [torch.linspace(0.02, 0.98, N, dtype=torch.float64), torch.rand(N, dtype=torch.float64)],
)
def test_weights_of_probabilities_give_these_probabilities(probability: Tensor) -> None:
    probability = probability * (100 / probability.sum())
    probability = probability.clamp(max=1)
    k = round(float(probability.sum()))
    weights = order_weights(probability)
    sampler = MarginSampler(seen(MARGINS), lambda *_: weights, num_samples=k)
    visits = torch.zeros(N, dtype=torch.float64)
    for epoch in range(1500):
        sampler.set_epoch(epoch)
        visits[list(sampler)] += 1
    # One in 1 / k of bias is allowed beside the error of the frequencies.
    error = (visits / 1500 - probability).abs()
    assert (error < 5 * (probability * (1 - probability) / 1500).sqrt() + 0.02).all()


def test_a_power_of_the_rank_is_that_of_composer() -> None:
    """Of n samples, the one that is the r-th easiest has the probability ((r + 1/2) / n)^(1/k)."""
    for keep in (0.5, 0.25):
        weights = weights_of(RankPower(keep), seen(MARGINS), round(keep * N)).double()
        rank = MARGINS.argsort(descending=True).argsort().double()
        quantile = (rank + 0.5) / N
        expected = quantile ** (1 / keep - 1)
        expected = expected * (keep * N / expected.sum())
        torch.testing.assert_close(1 - (-weights).exp(), expected, rtol=1e-4, atol=1e-5)
    flat = weights_of(RankPower(power=0), seen(MARGINS), 50)
    assert (flat - flat[0]).abs().max() < 1e-6


@pytest.mark.parametrize(("a", "b"), [(2.0, 4.0), (1.0, 1.0), (5.0, 1.0), (0.7, 3.0)])
def test_a_beta_window_has_its_density(a: float, b: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    weights = weights_of(BetaWindow(a=a, b=b), seen(MARGINS), 20).double()
    quantile = (MARGINS.argsort().argsort().double() + 0.5) / N
    density = torch.from_numpy(stats.beta.pdf(quantile.numpy(), a, b))
    expected = density * (20 / density.sum())
    torch.testing.assert_close(1 - (-weights).exp(), expected, rtol=1e-4, atol=1e-5)


def test_probabilities_above_one_are_capped() -> None:
    weights = weights_of(RankPower(power=30.0), seen(MARGINS), 60).double()
    probability = 1 - (-weights).exp()
    certain = weights.isposinf()
    assert 10 < int(certain.sum()) < 60
    assert torch.equal(
        certain.nonzero().flatten(), MARGINS.argsort()[: certain.sum()].sort().values
    )
    torch.testing.assert_close(probability.sum(), torch.tensor(60.0).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("policy", [RankPower(power=1e4), BetaWindow(b=1e4)])
def test_a_steep_density_still_gives_enough_samples(policy: Any) -> None:
    """Most densities are 0 in floating-point numbers."""
    assert int((weights_of(policy, seen(MARGINS), 190) > 0).sum()) >= 190


@pytest.mark.parametrize("policy", [SmallestMargins(), Strata(), BetaWindow(), RankPower()])
def test_too_few_seen_samples_are_an_error(policy: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^dynamics: expected at least k = 201 samples .* got 200;"
    ):
        policy(seen(MARGINS), 201, None)


def strata_by_definition(values: list[float], skip: int, strata: int, k: int) -> list[float]:
    """The probability of each sample, in plain Python."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    kept = order[skip:]
    low, high = values[kept[0]], values[kept[-1]]
    width = (high - low) / strata
    members: list[list[int]] = [[] for _ in range(strata)]
    for index in kept:
        members[min(int((values[index] - low) / width), strata - 1)].append(index)
    result, left = [0.0] * len(values), float(k)
    filled = sorted((group for group in members if group), key=len)
    for position, group in enumerate(filled):
        budget = min(len(group), left / (len(filled) - position))
        left -= budget
        for index in group:
            result[index] = budget / len(group)
    return result


@pytest.mark.parametrize("skip", [0.0, 0.1])
@pytest.mark.parametrize("num_strata", [1, 7, 50])
def test_strata_share_the_visits(skip: float, num_strata: int) -> None:
    policy = Strata(0.3, num_strata=num_strata, skip_hardest=skip)
    weights = weights_of(policy, seen(MARGINS), 60).double()
    expected = strata_by_definition(MARGINS.double().tolist(), round(skip * N), num_strata, 60)
    probability = torch.where(weights.isposinf(), 1.0, 1 - (-weights).exp())
    torch.testing.assert_close(probability, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
    assert math.isclose(sum(expected), 60)


def test_strata_visit_what_uniform_sampling_misses() -> None:
    margins = torch.cat([torch.full((190,), 4.0), torch.linspace(-4, 3, 10)])
    visited = frequencies(Strata(0.1), seen(margins), 50)
    assert (visited[190:] > 0.9).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_ranks_within_classes(labels: list[int]) -> None:
    expected = [labels[:place].count(label) for place, label in enumerate(labels)]
    assert rank_within_class(torch.tensor(labels)).tolist() == expected


def test_policies_are_values() -> None:
    assert SmallestMargins() == SmallestMargins(0.4, random_share=0.2, by="margin")
    assert len({Strata(), Strata(), RankPower()}) == 2
    assert "random_share=0.2" in repr(SmallestMargins())


ERRORS: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "keep 0": (SmallestMargins, {"keep": 0}, ValueError, r"^keep: expected a value in \(0, 1\]"),
    "keep": (Uniform, {"keep": 1.1}, ValueError, r"^keep: expected a value in \[0, 1\], got 1.1$"),
    "keep text": (Strata, {"keep": "a"}, TypeError, r"^keep: expected a float, got str$"),
    "keep bool": (RankPower, {"keep": True}, TypeError, r"^keep: expected a float, got bool$"),
    "keep nan": (BetaWindow, {"keep": math.nan}, ValueError, r"^keep: expected .* got nan$"),
    "random": (SmallestMargins, {"random_share": -0.1}, ValueError, r"^random_share: expected"),
    "by": (SmallestMargins, {"by": "margins"}, ValueError, r"^by: expected one of margin, .*'mar"),
    "by number": (BelowMeanLoss, {"by": 3}, TypeError, r"^by: expected a name, a tensor .* int$"),
    "by matrix": (RankPower, {"by": torch.ones(2, 2)}, ValueError, r"^by: expected shape \[N\]"),
    "skip by": (SmallestMargins, {"skip_by": "a"}, ValueError, r"^skip_by: expected one of"),
    "skip": (SmallestMargins, {"skip_hardest": 0.7}, ValueError, r"^skip_hardest: .* \[0, 0.6\]"),
    "skip auto": (Strata, {"skip_hardest": "most"}, TypeError, r"^skip_hardest: expected a float"),
    "strata": (Strata, {"num_strata": 0}, ValueError, r"^num_strata: expected"),
    "a": (BetaWindow, {"a": 0.0}, ValueError, r"^a: expected a finite value above 0, got 0.0$"),
    "b": (BetaWindow, {"b": math.inf}, ValueError, r"^b: expected a finite value above 0, got inf"),
    "power": (RankPower, {"power": -1}, ValueError, r"^power: expected a finite value above 0"),
    "power text": (RankPower, {"power": "a"}, TypeError, r"^power: expected a float, got str$"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_named(case: str) -> None:
    policy, arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        policy(**arguments)


@pytest.mark.parametrize("by", [torch.ones(3), lambda dynamics: torch.ones(3)])
def test_numbers_of_another_length_are_an_error(by: Any) -> None:
    with pytest.raises(ValueError, match=r"^by: expected shape \[200\], one number .* got \[3\]$"):
        SmallestMargins(by=by)(seen(MARGINS), 10, None)
