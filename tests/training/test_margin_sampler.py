"""MarginSampler: warm-up, policies, annealing, floors, loss weights, and resuming."""

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.data import DataLoader

from helpers.seen import see, seen
from marginops.training import (
    BelowMeanLoss,
    MarginSampler,
    RankPower,
    SmallestMargins,
    TrainingDynamics,
    Uniform,
)

N = 40
HARDEST = SmallestMargins(0.25, random_share=0.0)


def epoch_of(sampler: MarginSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def train(sampler: MarginSampler, epochs: range) -> list[list[int]]:
    """Visits the epochs. A sample's margin falls and rises with its id and its step."""
    visited = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        visited.append(list(sampler))
        for start in range(0, len(visited[-1]), 8):
            visit(sampler.dynamics, visited[-1][start : start + 8])
    return visited


def visit(dynamics: TrainingDynamics, ids: list[int]) -> None:
    step = dynamics.num_updates
    see(dynamics, ids, [math.sin(3.7 * sample + 0.1 * step) * 4 for sample in ids])


@given(st.integers(1, N), st.integers(0, 2**40))
def test_the_first_epochs_visit_every_sample_once(k: int, seed: int) -> None:
    sampler = MarginSampler(TrainingDynamics(N), num_samples=k, seed=seed)
    visited = train(sampler, range(-(-N // k)))
    assert all(len(set(ids)) == len(ids) == k for ids in visited)
    full = [sample for ids in visited[: N // k] for sample in ids]
    assert len(set(full)) == len(full)
    assert set(itertools.chain(*visited)) == set(range(N))
    assert len(sampler) == k


def test_after_the_first_epochs_the_smallest_margins_come() -> None:
    margins = torch.linspace(-3, 5, N)[torch.randperm(N)]
    sampler = MarginSampler(seen(margins), SmallestMargins(0.5, random_share=0.2))
    smallest = set(margins.argsort()[:16].tolist())
    epochs = [set(epoch_of(sampler, epoch)) for epoch in range(60)]
    assert all(smallest <= ids and len(ids) == 20 for ids in epochs)
    others = [sample for ids in epochs for sample in ids - smallest]
    assert set(others) == set(range(N)) - smallest, "the random share leaves samples out"
    assert max(others.count(sample) for sample in others) <= 25  # 10 expected
    assert sampler.dynamics.weights_version == 59


def test_one_unseen_sample_is_certain() -> None:
    dynamics = TrainingDynamics(N)
    see(dynamics, range(N - 1), torch.linspace(-3, 5, N - 1).tolist())
    assert set(epoch_of(MarginSampler(dynamics, HARDEST), 0)) == {*range(9), N - 1}


def test_margins_that_are_not_numbers_are_never_first() -> None:
    margins = torch.linspace(-3, 5, N)
    margins[3] = torch.nan
    dynamics = seen(margins)
    assert 3 not in epoch_of(MarginSampler(dynamics, HARDEST), 0)
    assert dynamics.num_nonfinite == 1
    all_nan = seen([math.nan] * N)
    assert len(set(epoch_of(MarginSampler(all_nan, HARDEST), 0))) == 10


@pytest.mark.parametrize("policy", [SmallestMargins(), BelowMeanLoss(), RankPower()])
def test_no_margin_at_all_ends(policy: Any) -> None:
    for margins in ([math.nan] * N, [math.inf] * N, [0.0] * N, [-math.inf] * N):
        sampler = MarginSampler(seen(margins), policy)
        assert len(set(epoch_of(sampler, 0))) == len(sampler)


def test_weights_are_computed_once_an_epoch() -> None:
    calls = []

    def policy(dynamics: TrainingDynamics, k: int, labels: Tensor | None) -> Tensor:
        calls.append((k, labels))
        return torch.ones(N)

    sampler = MarginSampler(seen(torch.zeros(N)), policy, num_samples=7)
    for epoch in (0, 0, 1):
        assert epoch_of(sampler, epoch) == list(sampler)
    assert calls == [(7, None)] * 2


def test_epochs_without_set_epoch_have_weights() -> None:
    sampler = MarginSampler(seen(torch.linspace(-3, 5, N)), HARDEST)
    assert sorted(sampler) == list(range(10))


def test_the_last_share_of_the_epochs_draws_from_all() -> None:
    dynamics = seen(torch.linspace(-3, 5, N))
    sampler = MarginSampler(dynamics, HARDEST, num_epochs=20, anneal=0.1)
    uniform = [e for e in range(20) if sorted(epoch_of(sampler, e)) != list(range(10))]
    assert uniform == [18, 19]
    for anneal, first in ((0.0, 20), (0.3, 14), (0.01, 19), (1.0, 0)):
        sampler = MarginSampler(dynamics, HARDEST, num_epochs=20, anneal=anneal)
        uniform = [e for e in range(20) if sorted(epoch_of(sampler, e)) != list(range(10))]
        assert uniform == list(range(first, 20))


@pytest.mark.parametrize(("threshold", "uniform"), [(0.5, True), (0.6, False), (None, False)])
def test_a_fitted_training_set_is_drawn_alike(threshold: float | None, uniform: bool) -> None:
    margins = torch.ones(N)
    margins[:16] = -1.0  # 24 of 40 are correct
    sampler = MarginSampler(seen(margins), HARDEST, uniform_above=threshold)
    assert (sorted(epoch_of(sampler, 0)) != list(range(10))) == uniform


@pytest.mark.parametrize("policy", [HARDEST, SmallestMargins(0.25), RankPower(0.25), Uniform(0.25)])
def test_every_class_has_its_floor(policy: Any) -> None:
    labels = torch.tensor([0] * 20 + [1] * 12 + [5] * 8)
    dynamics = seen(torch.linspace(-3, 5, N))  # the first class is the hardest
    for floor, least in ((0.25, [5, 3, 2]), (0.2, [4, 2, 1])):
        sampler = MarginSampler(dynamics, policy, labels=labels, class_floor=floor)
        for epoch in range(5):
            ids = epoch_of(sampler, epoch)
            assert len(set(ids)) == 10
            counts = labels[ids].bincount(minlength=6)[[0, 1, 5]]
            assert (counts >= torch.tensor(least)).all()
            if policy is HARDEST:
                smallest = [*range(10 - sum(least[1:])), *range(20, 20 + least[1])]
                assert sorted(ids) == [*smallest, *range(32, 32 + least[2])]
        dynamics.weights_version = -1


@given(st.integers(0, 70))
def test_a_killed_run_goes_on_bit_for_bit(stop: int) -> None:
    def fresh() -> MarginSampler:
        return MarginSampler(TrainingDynamics(N), SmallestMargins(0.3), seed=3, num_epochs=6)

    expected = train(fresh(), range(6))
    sampler = fresh()
    done = train(sampler, range(stop // 12))
    epoch, position = divmod(stop, 12)
    sampler.set_epoch(epoch)
    iterator = iter(sampler)
    current: list[int] = []
    while len(current) + 8 <= position:
        current += list(itertools.islice(iterator, 8))
        visit(sampler.dynamics, current[-8:])
    states = sampler.dynamics.state_dict(), sampler.state_dict(position=len(current))

    resumed = fresh()
    dynamics_state, state = pickle.loads(pickle.dumps(states))
    resumed.dynamics.load_state_dict(dynamics_state)
    resumed.load_state_dict(state)
    resumed.set_epoch(epoch)
    rest = list(resumed)
    for start in range(0, len(rest), 8):
        visit(resumed.dynamics, rest[start : start + 8])
    assert [*done, current + rest, *train(resumed, range(epoch + 1, 6))] == expected


def test_a_state_without_its_dynamics_is_an_error() -> None:
    sampler = MarginSampler(TrainingDynamics(N))
    train(sampler, range(3))
    for position in (None, 4):
        other = MarginSampler(TrainingDynamics(N))
        other.load_state_dict(sampler.state_dict(position))
        message = r"^dynamics: .*epoch 2, .* got those of epoch -1"
        with pytest.raises(ValueError, match=message):
            iter(other)
        with pytest.raises(ValueError, match=message):
            other.set_epoch(2)
    fresh = MarginSampler(TrainingDynamics(N))
    fresh.load_state_dict(MarginSampler(TrainingDynamics(N)).state_dict())
    assert len(list(fresh)) == 16


def test_a_state_of_other_weights_than_its_epoch_is_an_error() -> None:
    sampler = MarginSampler(TrainingDynamics(N))
    sampler.set_epoch(2)
    state = sampler.state_dict(position=4) | {"weights_version": 1}
    with pytest.raises(ValueError, match=r"^state_dict: expected weights_version 2, .* got 1$"):
        sampler.load_state_dict(state)


def test_weights_of_another_length_of_epochs_are_an_error() -> None:
    dynamics = seen(torch.linspace(-3, 5, N))
    MarginSampler(dynamics, HARDEST).set_epoch(0)
    message = (
        r"^dynamics\.weights: expected at least num_samples, 20, .*; make the sampler with the p"
    )
    with pytest.raises(ValueError, match=message):
        MarginSampler(dynamics, SmallestMargins(0.5)).set_epoch(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes(workers: int) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def fresh() -> tuple[MarginSampler, Any]:
        sampler = MarginSampler(TrainingDynamics(N), seed=3)
        loader = loaders.StatefulDataLoader(
            torch.arange(N), batch_size=4, sampler=sampler, num_workers=workers
        )
        return sampler, loader

    def run(sampler: MarginSampler, loader: Any, epochs: range, stop: int = 1000) -> list[int]:
        visited: list[int] = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            for batch in loader:
                visit(sampler.dynamics, batch.tolist())
                visited += batch.tolist()
                if len(visited) >= stop:
                    return visited
        return visited

    expected = run(*fresh(), range(5))
    sampler, loader = fresh()
    begun = run(sampler, loader, range(5), stop=56)  # in the middle of epoch 3
    states = pickle.dumps((sampler.dynamics.state_dict(), loader.state_dict()))
    sampler, loader = fresh()
    dynamics_state, state = pickle.loads(states)
    sampler.dynamics.load_state_dict(dynamics_state)
    loader.load_state_dict(state)
    assert begun + run(sampler, loader, range(3, 5)) == expected

    sampler, loader = fresh()
    loader.load_state_dict(pickle.loads(states)[1])
    with pytest.raises(ValueError, match=r"^dynamics: expected the weights of epoch 3"):
        next(iter(loader))


def test_a_loader_with_workers_trains() -> None:
    sampler = MarginSampler(TrainingDynamics(N))
    loader = DataLoader(torch.arange(N), batch_size=5, sampler=sampler, num_workers=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in loader:
            visit(sampler.dynamics, batch.tolist())
    assert sampler.dynamics.count.sum() == 48


@pytest.mark.parametrize(
    "policy", [SmallestMargins(0.5), BelowMeanLoss(0.7), Uniform(0.3), Uniform(1.0)]
)
def test_weighted_losses_are_unbiased(policy: Any) -> None:
    margins = torch.randn(N) * 2
    dynamics = seen(margins)
    sampler = MarginSampler(dynamics, policy)
    values = torch.rand(N, dtype=torch.float64) + 1
    estimates = []
    for epoch in range(800):
        ids = torch.tensor(epoch_of(sampler, epoch))
        estimates.append(float((sampler.loss_weights(ids) * values[ids]).sum()))
    assert sampler.unbiased
    mean = torch.tensor(estimates).mean().item()
    error = torch.tensor(estimates).std().item() / math.sqrt(len(estimates))
    assert abs(mean - float(values.sum())) < 4 * error + 1e-4
    plain = float(values.sum()) * len(sampler) / N
    assert policy == Uniform(1.0) or abs(plain - float(values.sum())) > 10 * error


def test_kept_easy_samples_weigh_more() -> None:
    margins = [-1.0] * 10 + [4.0] * 30
    sampler = MarginSampler(seen(margins), BelowMeanLoss(0.7))  # 18 of 30 easy samples
    weights = sampler.loss_weights(torch.tensor([0, 20]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 30 / 18]))


@pytest.mark.parametrize(
    "policy",
    [HARDEST, RankPower(0.5), SmallestMargins(0.5, skip_hardest=0.1)],
    ids=["no random share", "several weights", "skipped"],
)
def test_loss_weights_that_are_not_exact_are_an_error(policy: Any) -> None:
    sampler = MarginSampler(seen(torch.linspace(-3, 5, N)), policy)
    assert not sampler.unbiased
    with pytest.raises(ValueError, match=r"^policy: expected weights of inf and of one other"):
        sampler.loss_weights(torch.tensor([0]))


def test_loss_weights_during_the_first_epochs() -> None:
    sampler = MarginSampler(TrainingDynamics(N))
    (ids,) = train(sampler, range(1))
    torch.testing.assert_close(sampler.loss_weights(torch.tensor(ids)), torch.full((16,), 2.5))
    train(sampler, range(1, 2))
    assert not sampler.unbiased


@pytest.mark.parametrize(
    ("indices", "error", "got"),
    [
        ([0], TypeError, "got list"),
        (torch.tensor([0.0]), TypeError, "got torch.float32"),
        (torch.tensor([N]), ValueError, f"got {N} to {N}"),
        (torch.tensor([0, -1]), ValueError, "got -1 to 0"),
    ],
)
def test_loss_weights_check_their_indices(indices: Any, error: type[Exception], got: str) -> None:
    with pytest.raises(error, match=rf"^indices: expected .*{got}"):
        MarginSampler(seen(torch.zeros(N))).loss_weights(indices)


def no_weights(weights: Any) -> Callable[..., Any]:
    return lambda dynamics, k, labels: weights


POLICY_ERRORS = {
    "nothing": (None, TypeError, r"^policy: expected a tensor \[N\], got NoneType"),
    "short": (torch.ones(3), ValueError, r"^policy: expected weights of shape \[40\], got \[3\]$"),
    "zeros": (torch.zeros(N), ValueError, r"^policy: expected a positive weight, got 40 weights"),
    "negative": (-torch.ones(N), ValueError, r"^policy: expected numbers in \[0, inf\], got -1.0"),
    "nan": (torch.full((N,), math.nan), ValueError, r"^policy: .* got nan for sample 0"),
    "few": (torch.eye(N)[0], ValueError, r"^policy: expected at least num_samples, 5, positive"),
    "infinite": (torch.ones(N) / 0, ValueError, r"^policy: expected at most num_samples, 5, inf"),
}


@pytest.mark.parametrize("case", POLICY_ERRORS)
def test_wrong_weights_of_a_policy_are_named(case: str) -> None:
    weights, error, message = POLICY_ERRORS[case]
    sampler = MarginSampler(seen(torch.zeros(N)), no_weights(weights), num_samples=5)
    with pytest.raises(error, match=message):
        sampler.set_epoch(0)
    assert sampler.dynamics.weights is None


LABELS = torch.arange(N) % 4
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dynamics": ({"dynamics": 40}, TypeError, r"^dynamics: expected TrainingDynamics, got int$"),
    "policy": ({"policy": 0.4}, TypeError, r"^policy: expected a policy such as .*, got float$"),
    "no keep": ({"policy": no_weights(1)}, ValueError, r"^num_samples: expected an int with a pol"),
    "above N": ({"num_samples": N + 1}, ValueError, r"^num_samples: expected at most 40, .* 41;"),
    "none": ({"num_samples": 0}, ValueError, r"^num_samples: expected"),
    "labels": ({"labels": [0] * N}, TypeError, r"^labels: expected a tensor \[N\], got list$"),
    "dtype": ({"labels": LABELS.float()}, TypeError, r"^labels: expected dtype torch.int64, got"),
    "short": ({"labels": LABELS[1:]}, ValueError, r"^labels: expected shape \[40\], .* \[39\]$"),
    "negative": ({"labels": -LABELS}, ValueError, r"^labels: expected classes >= 0, got -3$"),
    "no labels": ({"class_floor": 0.1}, ValueError, r"^labels: expected a tensor \[N\] with class"),
    "floor": (
        {"class_floor": 0.5, "labels": LABELS},
        ValueError,
        r"^class_floor: expected a value in \[0, 0.4\], got 0.5$",
    ),
    "anneal": ({"anneal": 1.5}, ValueError, r"^anneal: expected a value in \[0, 1\], got 1.5$"),
    "text": ({"anneal": "all"}, TypeError, r"^anneal: expected a float, got str$"),
    "epochs": ({"num_epochs": 0}, ValueError, r"^num_epochs: expected"),
    "above": ({"uniform_above": -0.1}, ValueError, r"^uniform_above: expected a value in \[0, 1\]"),
    "rank": ({"rank": 2, "num_replicas": 2}, ValueError, r"^rank: expected"),
    "seed": ({"seed": 0.5}, TypeError, r"^seed: expected an int, got float"),
    "group": ({"group": "gloo"}, TypeError, r"^group: expected a torch.distributed.ProcessGroup"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        MarginSampler(**{"dynamics": TrainingDynamics(N), **arguments})


def test_a_share_counts_samples_exactly() -> None:
    """0.07 * 100 is a little more than 7 in floating-point numbers."""
    assert len(MarginSampler(TrainingDynamics(100), SmallestMargins(0.07))) == 7
    assert len(MarginSampler(TrainingDynamics(101), SmallestMargins(0.07))) == 8
