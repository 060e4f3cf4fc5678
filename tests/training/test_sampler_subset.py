"""MarginSampler with a subset: epochs of a part of the samples, which keep their indices."""

import itertools
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

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
    WeightedSampler,
)

N = 40
SUBSET = torch.tensor([31, 2, 3, 17, 39, 8, 21, 22, 5, 30, 11, 12])
M = len(SUBSET)
POLICIES = [
    SmallestMargins(0.5),
    SmallestMargins(0.5, random_share=0.0),
    SmallestMargins(0.5, skip_hardest=0.25),
    Strata(0.5, num_strata=4),
    BetaWindow(0.5),
    RankPower(0.5),
    BelowMeanLoss(0.5),
    Uniform(0.5),
]


def epoch_of(sampler: Any, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def margins() -> torch.Tensor:
    """Margins of all samples, of which those outside the subset are the smallest."""
    values = torch.linspace(-9, -5, N)
    values[SUBSET] = torch.linspace(-2, 4, M)
    return values


def train(sampler: MarginSampler, epochs: range, others: bool = False) -> list[list[int]]:
    """Visit the epochs; with ``others``, some of all N samples are seen in between."""
    visited = []
    for epoch in epochs:
        visited.append(epoch_of(sampler, epoch))
        see(sampler.dynamics, visited[-1], [(7 * i % 11) - 4.0 for i in visited[-1]])
        if others:
            rest = sorted(set(range(N)) - set(SUBSET.tolist()))[::2]
            see(sampler.dynamics, rest, [-50.0] * len(rest))
    return visited


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_subset_is_drawn_as_a_data_set_of_its_own(policy: Any) -> None:
    """The oracle has M samples, and the same policy chooses by the same margins."""
    ascending = SUBSET.sort().values
    whole = MarginSampler(seen(margins()), policy, subset=SUBSET)
    alone = MarginSampler(seen(margins()[ascending]), policy)
    assert len(whole) == len(alone) == M // 2
    for epoch in range(20):
        whole.set_epoch(epoch)
        alone.set_epoch(epoch)
        weights = whole.dynamics.weights
        assert torch.equal(weights[ascending], alone.dynamics.weights)
        assert int((weights > 0).sum()) == int((alone.dynamics.weights > 0).sum())
        assert set(whole) <= set(SUBSET.tolist())


@given(st.integers(1, M), st.integers(0, 2**40), st.booleans())
def test_the_first_epochs_visit_the_subset_once(k: int, seed: int, others: bool) -> None:
    sampler = MarginSampler(TrainingDynamics(N), num_samples=k, subset=SUBSET, seed=seed)
    visited = train(sampler, range(-(-M // k)), others)
    full = [sample for ids in visited[: M // k] for sample in ids]
    assert len(set(full)) == len(full) == M // k * k
    assert set(itertools.chain(*visited)) == set(SUBSET.tolist())


def test_samples_outside_the_subset_that_were_seen_change_nothing() -> None:
    quiet, noisy = (MarginSampler(TrainingDynamics(N), subset=SUBSET) for _ in range(2))
    assert train(quiet, range(8)) == train(noisy, range(8), others=True)


def test_the_whole_data_set_as_subset_changes_nothing() -> None:
    plain = MarginSampler(TrainingDynamics(N), seed=5)
    subset = MarginSampler(TrainingDynamics(N), seed=5, subset=torch.arange(N).flip(0))
    assert train(plain, range(8)) == train(subset, range(8))


@pytest.mark.parametrize("num_samples", [1, 5, M])
def test_an_epoch_may_have_any_length_up_to_the_subset(num_samples: int) -> None:
    sampler = MarginSampler(seen(margins()), num_samples=num_samples, subset=SUBSET)
    ids = epoch_of(sampler, 0)
    assert len(set(ids)) == len(ids) == len(sampler) == num_samples
    assert set(ids) <= set(SUBSET.tolist())


def test_the_last_epochs_draw_from_the_subset_alike() -> None:
    sampler = MarginSampler(
        seen(margins()), SmallestMargins(0.5, random_share=0), subset=SUBSET, num_epochs=40
    )
    hardest = set(epoch_of(sampler, 0))
    assert hardest == set(SUBSET[: M // 2].tolist())
    last = [set(epoch_of(sampler, epoch)) for epoch in range(36, 40)]
    assert any(ids != hardest for ids in last)
    assert set().union(*last) <= set(SUBSET.tolist())


def test_the_share_of_positive_margins_is_that_of_the_subset() -> None:
    values = margins()  # 8 of 12 are positive, none of the others
    for threshold, uniform in ((0.6, True), (0.7, False)):
        sampler = MarginSampler(
            seen(values), SmallestMargins(0.5), subset=SUBSET, uniform_above=threshold
        )
        sampler.set_epoch(0)
        assert bool((sampler.dynamics.weights[SUBSET] == 1).all()) == uniform
        assert float(sampler.dynamics.weights.sum()) == (M if uniform else torch.inf)


def test_every_class_of_the_subset_has_its_floor() -> None:
    labels = torch.zeros(N, dtype=torch.int64)
    labels[SUBSET[-4:]] = 3  # the easy third of the subset
    labels[torch.tensor([0, 1, 4])] = 7  # a class outside it
    policy = SmallestMargins(0.5, random_share=0)
    options = {"subset": SUBSET, "labels": labels}
    without = epoch_of(MarginSampler(seen(margins()), policy, **options), 0)
    assert 3 not in labels[without]
    sampler = MarginSampler(seen(margins()), policy, class_floor=0.5, **options)
    ids = epoch_of(sampler, 0)
    assert sorted(ids) == sorted([*SUBSET[:4].tolist(), *SUBSET[-4:-2].tolist()])


def test_loss_weights_are_those_of_the_subset() -> None:
    sampler = MarginSampler(seen(margins()), Uniform(0.25), subset=SUBSET)
    ids = torch.tensor(epoch_of(sampler, 0))
    torch.testing.assert_close(sampler.loss_weights(ids), torch.full((3,), 4.0))
    for other in (0, 4, 38):
        with pytest.raises(ValueError, match=r"^indices: expected samples of the subset, got oth"):
            sampler.loss_weights(torch.tensor([int(ids[0]), other]))
    short = MarginSampler(seen(margins()), num_samples=3, subset=SUBSET[SUBSET < 39])
    with pytest.raises(ValueError, match=r"^indices: expected samples of the subset, got others"):
        short.loss_weights(torch.tensor([39]))


@pytest.mark.parametrize("epoch", [1, 4])
def test_a_killed_run_goes_on(epoch: int) -> None:
    def fresh() -> MarginSampler:
        return MarginSampler(TrainingDynamics(N), SmallestMargins(0.5), subset=SUBSET, seed=3)

    expected = train(fresh(), range(6))
    sampler = fresh()
    train(sampler, range(epoch))
    ids = epoch_of(sampler, epoch)
    see(sampler.dynamics, ids[:2], [(7 * i % 11) - 4.0 for i in ids[:2]])
    states = pickle.dumps((sampler.dynamics.state_dict(), sampler.state_dict(position=2)))
    resumed = fresh()
    dynamics_state, state = pickle.loads(states)
    resumed.dynamics.load_state_dict(dynamics_state)
    resumed.load_state_dict(state)
    rest = epoch_of(resumed, epoch)
    assert ids[:2] + rest == expected[epoch]
    see(resumed.dynamics, rest, [(7 * i % 11) - 4.0 for i in rest])
    assert train(resumed, range(epoch + 1, 6)) == expected[epoch + 1 :]


def test_weights_of_another_subset_are_refused() -> None:
    sampler = MarginSampler(seen(margins()), num_samples=3, subset=SUBSET)
    sampler.set_epoch(2)
    other = MarginSampler(sampler.dynamics, num_samples=3, subset=torch.arange(12))
    with pytest.raises(ValueError, match=r"^dynamics\.weights: expected 0 for all samples outsid"):
        other.set_epoch(2)


def test_weights_of_a_sampler_that_keeps_some_draw_them_alone() -> None:
    weights = torch.zeros(N)
    weights[SUBSET] = 1
    assert set(epoch_of(WeightedSampler(weights), 1)) == set(SUBSET.tolist())


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([1, 2], TypeError, r"^subset: expected a tensor \[M\], got list"),
    "mask": (torch.ones(N) > 0, TypeError, r"^subset: expected dtype torch.int64, got torch.bool"),
    "matrix": (SUBSET[None], ValueError, r"^subset: expected shape \[M\], got \[1, 12\]"),
    "empty": (SUBSET[:0], ValueError, r"^subset: expected at least one sample, got none$"),
    "above": (SUBSET + 1, ValueError, r"^subset: expected samples in \[0, 40\), got 3 to 40; make"),
    "below": (SUBSET - 3, ValueError, r"^subset: expected samples in \[0, 40\), got -1 to 36; mak"),
    "twice": (
        torch.tensor([4, 9, 4]),
        ValueError,
        r"^subset: expected different samples, got 4 2 times$",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_subsets_are_named(case: str) -> None:
    subset, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        MarginSampler(TrainingDynamics(N), subset=subset)


def test_an_epoch_longer_than_the_subset_is_refused() -> None:
    message = r"^num_samples: expected at most 12, the size of the subset, got 13; no sample comes"
    with pytest.raises(ValueError, match=message):
        MarginSampler(TrainingDynamics(N), num_samples=M + 1, subset=SUBSET)


def test_a_floor_above_the_share_of_the_subset_is_refused() -> None:
    labels = torch.zeros(N, dtype=torch.int64)
    options = {"num_samples": 6, "subset": SUBSET, "labels": labels}
    MarginSampler(TrainingDynamics(N), class_floor=0.5, **options)
    with pytest.raises(
        ValueError, match=r"^class_floor: expected a value in \[0, 0\.5\], got 0\.6"
    ):
        MarginSampler(TrainingDynamics(N), class_floor=0.6, **options)
