"""ReductionSampler: when it reduces, what it keeps, how long epochs are, and how it resumes."""

import itertools
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Subset, TensorDataset

from helpers.seen import see, seen
from marginops import log_norm_product, sample_statistics
from marginops.training import ReductionSampler, TrainingDynamics

N = 50
MARGINS = torch.rand(N, generator=torch.Generator().manual_seed(2)) + 0.1
ORDER = MARGINS.argsort().tolist()


def epoch_of(sampler: ReductionSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def kept_of(sampler: ReductionSampler, epoch: int) -> set[int]:
    kept = set(epoch_of(sampler, epoch))
    assert kept == set(sampler.kept.tolist())
    return kept


def test_all_samples_until_they_are_separated() -> None:
    dynamics = TrainingDynamics(N)
    sampler = ReductionSampler(dynamics, 5)
    margins = MARGINS.clone()
    margins[ORDER[-1]] = 0.0
    assert sampler.reduced_at is None
    assert sorted(epoch_of(sampler, 0)) == list(range(N))
    see(dynamics, range(1, N), margins[1:].tolist())
    assert sorted(epoch_of(sampler, 1)) == list(range(N)), "one sample was never seen"
    see(dynamics, [0], [1.0])
    assert sorted(epoch_of(sampler, 2)) == list(range(N)), "one margin is 0"
    assert sampler.kept.tolist() == list(range(N))
    see(dynamics, range(N), MARGINS.tolist())
    ids = epoch_of(sampler, 3)
    assert sampler.reduced_at == 3
    assert sampler.kept.tolist() == sorted(ORDER[:5])
    assert sorted(ids) == sorted(ORDER[:5] * 10)
    assert len(sampler) == N
    passes = [tuple(ids[start : start + 5]) for start in range(0, N, 5)]
    assert all(set(visits) == set(ORDER[:5]) for visits in passes)
    assert len(set(passes)) > 5


@pytest.mark.parametrize(("share", "reduced"), [(0.8, True), (0.81, False), (0.0, True)])
def test_a_share_of_positive_margins_is_enough(share: float, reduced: bool) -> None:
    margins = MARGINS.clone()
    margins[:10] = -1.0
    sampler = ReductionSampler(seen(margins), 5, trigger=share)
    sampler.set_epoch(0)
    assert (sampler.reduced_at == 0) == reduced


def test_an_unseen_sample_delays_the_reduction() -> None:
    dynamics = TrainingDynamics(N)
    see(dynamics, range(1, N), MARGINS[1:].tolist())
    sampler = ReductionSampler(dynamics, 5, trigger=0.5)
    sampler.set_epoch(0)
    assert sampler.reduced_at is None


def test_unseen_samples_come_first() -> None:
    dynamics = TrainingDynamics(N)
    sampler = ReductionSampler(dynamics, 5, num_samples=20)
    visited = []
    for epoch in range(3):
        visited.append(epoch_of(sampler, epoch))
        see(dynamics, visited[-1], MARGINS[visited[-1]].tolist())
    assert set(itertools.chain(*visited)) == set(range(N))
    assert kept_of(sampler, 3) == set(ORDER[:5])


def test_controls_keep_others() -> None:
    assert kept_of(ReductionSampler(seen(MARGINS), 5, choice="largest"), 0) == set(ORDER[-5:])
    choices = {
        frozenset(kept_of(ReductionSampler(seen(MARGINS), 5, choice="random", seed=seed), 0))
        for seed in range(30)
    }
    assert len(choices) == 30
    assert len(set().union(*choices)) > 40
    sampler = ReductionSampler(seen(MARGINS), 5, choice="random")
    assert kept_of(sampler, 0) == kept_of(sampler, 1) == kept_of(sampler, 9)


def test_margins_that_are_not_numbers_are_kept_last() -> None:
    margins = MARGINS.clone()
    margins[ORDER[0]] = torch.nan
    for choice in ("smallest", "largest"):
        sampler = ReductionSampler(seen(margins), 49, trigger=0.9, choice=choice)
        assert kept_of(sampler, 0) == set(range(N)) - {ORDER[0]}


def test_the_set_shrinks_by_a_factor() -> None:
    dynamics = seen(MARGINS)
    sampler = ReductionSampler(dynamics, 4, factor=0.5, every=2)
    sizes = []
    for epoch in range(9):
        sizes.append(len(kept_of(sampler, epoch)))
        # The order of margins turns round. Without readmission only kept samples can stay.
        kept = sampler.kept
        see(dynamics, kept, (2 - dynamics.margin[kept]).tolist())
    assert sizes == [25, 25, 13, 13, 7, 7, 4, 4, 4]
    assert set(sampler.kept.tolist()) <= set(ORDER[:25])


@pytest.mark.parametrize("readmit", [False, True])
def test_readmission_chooses_from_all_again(readmit: bool) -> None:
    dynamics = seen(MARGINS)
    sampler = ReductionSampler(dynamics, 5, readmit=readmit)
    assert kept_of(sampler, 0) == set(ORDER[:5])
    see(dynamics, sampler.kept, [9.0] * 5)
    assert kept_of(sampler, 1) == set(ORDER[5:10] if readmit else ORDER[:5])


def test_every_class_keeps_some() -> None:
    labels = torch.zeros(N, dtype=torch.int64)
    labels[ORDER[-3:]] = 2  # a class with the largest margins
    labels[ORDER[20:40]] = 1
    sampler = ReductionSampler(seen(MARGINS), 12, labels=labels, class_floor=4)
    # The last class has three samples, and the smallest margin beyond the floors fills up.
    assert kept_of(sampler, 0) == {*ORDER[:5], *ORDER[20:24], *ORDER[-3:]}


def test_the_margins_may_come_from_one_network() -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    inputs, target = torch.randn(N, 6), torch.randint(3, (N,))

    def rescore() -> torch.Tensor:
        with torch.no_grad():
            log_norm = log_norm_product(nn.Sequential(network[0], network[3]))
            return sample_statistics(network.eval()(inputs), target, log_norm=log_norm).margin

    sampler = ReductionSampler(seen(MARGINS), 5, rescore=rescore)
    expected = rescore().argsort()[:5]
    assert kept_of(sampler, 0) == set(expected.tolist())

    # As the documentation says: the running statistics of all data, after training on a few.
    data = TensorDataset(inputs, target)
    loader = DataLoader(data, batch_size=10, sampler=sampler)
    network.train()
    for batch, _ in loader:
        network(batch)
    reduced_mean = network[1].running_mean.clone()
    update_bn(DataLoader(data, batch_size=N), network)
    assert not torch.allclose(reduced_mean, network[1].running_mean, atol=1e-2)
    torch.testing.assert_close(network[1].running_mean, network[0](inputs).mean(0))
    assert len(Subset(data, sampler.kept.tolist())) == 5


@pytest.mark.parametrize(
    ("margins", "error", "message"),
    [
        (None, TypeError, r"^rescore: expected a tensor \[N\], got NoneType"),
        (torch.ones(3), ValueError, r"^rescore: expected margins of shape \[50\], got \[3\]$"),
    ],
)
def test_wrong_new_margins_are_named(margins: Any, error: type[Exception], message: str) -> None:
    sampler = ReductionSampler(seen(MARGINS), 5, rescore=lambda: margins)
    with pytest.raises(error, match=message):
        sampler.set_epoch(0)
    assert sampler.reduced_at is None


def test_an_epoch_shrinks_only_on_request() -> None:
    sampler = ReductionSampler(seen(MARGINS), 6, factor=0.5, shrink=True, num_replicas=4)
    assert len(sampler) == 13
    lengths = []
    for epoch in range(5):
        ids = epoch_of(sampler, epoch)
        assert len(ids) == len(sampler)
        lengths.append((len(sampler), sampler.epoch_size))
    assert lengths == [(7, 25), (4, 13), (2, 7), (2, 6), (2, 6)]
    assert sampler.epoch == 4


@pytest.mark.parametrize("shrink", [False, True])
def test_a_budget_of_visits_ends_the_run(shrink: bool) -> None:
    dynamics = TrainingDynamics(N)
    sampler = ReductionSampler(dynamics, 20, budget=50, shrink=shrink)
    visits = 0
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        if sampler.finished:
            break
        ids = list(sampler)
        visits += len(ids) if sampler.reduced_at is not None else 0
        see(dynamics, ids, MARGINS[ids].tolist())
    assert visits == (60 if shrink else 50)
    assert not ReductionSampler(dynamics, 20).finished


@given(
    st.integers(0, 200),
    st.sampled_from([{}, {"readmit": True}, {"factor": 0.5}, {"shrink": True}]),
    st.sampled_from(["smallest", "random"]),
)
def test_a_killed_run_goes_on_bit_for_bit(stop: int, options: Any, choice: Any) -> None:
    def fresh() -> ReductionSampler:
        return ReductionSampler(TrainingDynamics(N), 7, seed=3, choice=choice, **options)

    def visit(sampler: ReductionSampler, ids: list[int]) -> None:
        step = sampler.dynamics.num_updates
        see(sampler.dynamics, ids, [0.1 + (sample * 7 + step) % 11 for sample in ids])

    def train(sampler: ReductionSampler, epoch: int, state: Any = None) -> Any:
        seen_ids: list[int] = []
        while epoch < 5:
            sampler.set_epoch(epoch)
            position, iterator = sampler.state_dict()["position"], iter(sampler)
            while ids := list(itertools.islice(iterator, 6)):
                if len(seen_ids) + 6 > stop and state is None:
                    here = sampler.state_dict(position)
                    state = seen_ids[:], pickle.dumps((sampler.dynamics.state_dict(), here))
                visit(sampler, ids)
                seen_ids += ids
                position += len(ids)
            epoch += 1
        return seen_ids, state

    expected, state = train(fresh(), 0)
    if state is None:
        return
    before, saved = state
    dynamics_state, sampler_state = pickle.loads(saved)
    resumed = fresh()
    resumed.dynamics.load_state_dict(dynamics_state)
    resumed.load_state_dict(sampler_state)
    rest, _ = train(resumed, resumed.epoch, state=())
    assert before + rest == expected


def shrunk() -> tuple[ReductionSampler, list[Any]]:
    """A sampler in its reduced epoch, and the states of both epochs."""
    sampler = ReductionSampler(TrainingDynamics(N), 5, shrink=True, trigger=0.0)
    states = []
    for epoch, position in enumerate((N - 3, 2)):
        sampler.set_epoch(epoch)
        states.append((sampler.dynamics.state_dict(), sampler.state_dict(position)))
        see(sampler.dynamics, range(N), MARGINS)
    return sampler, states


def test_the_dynamics_may_be_loaded_after_the_sampler() -> None:
    sampler, states = shrunk()
    other = ReductionSampler(TrainingDynamics(N), 5, shrink=True)
    other.load_state_dict(states[1][1])
    other.dynamics.load_state_dict(states[1][0])
    assert list(other) == list(sampler)[2:] and len(list(sampler)) == 5


def test_a_run_goes_back_to_a_longer_epoch() -> None:
    sampler, states = shrunk()
    assert len(sampler) == 5
    sampler.dynamics.load_state_dict(states[0][0])
    sampler.load_state_dict(states[0][1])
    sampler.set_epoch(0)
    assert len(sampler) == N and len(list(sampler)) == 3


def test_a_state_without_its_dynamics_is_an_error() -> None:
    sampler = ReductionSampler(seen(MARGINS), 5)
    sampler.set_epoch(3)
    other = ReductionSampler(seen(MARGINS), 5)
    other.load_state_dict(sampler.state_dict(position=4))
    with pytest.raises(ValueError, match=r"^dynamics: expected the weights of epoch 3"):
        iter(other)
    with pytest.raises(ValueError, match=r"^dynamics: expected the weights that hold the kept"):
        other.set_epoch(4)
    with pytest.raises(ValueError, match=r"^epoch: expected at least 3, .* got 2; make a new"):
        other.set_epoch(2)


@pytest.mark.parametrize("value", [None, -2, 1.0, True])
def test_damaged_states_are_errors(value: Any) -> None:
    sampler = ReductionSampler(TrainingDynamics(N), 5)
    with pytest.raises(ValueError, match=r"^state_dict: expected reduced_at as an int >= -1, got"):
        sampler.load_state_dict(sampler.state_dict() | {"reduced_at": value})
    with pytest.raises(TypeError, match=r"^state_dict: expected a mapping, got list$"):
        sampler.load_state_dict([])


LABELS = torch.arange(N) % 4
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dynamics": ({"dynamics": 3}, TypeError, r"^dynamics: expected TrainingDynamics, got int$"),
    "none": ({"num_kept": 0}, ValueError, r"^num_kept: expected"),
    "above N": ({"num_kept": 51}, ValueError, r"^num_kept: expected at most 50, .* got 51$"),
    "share": ({"num_kept": 0.1}, TypeError, r"^num_kept: expected an int, got float"),
    "trigger": ({"trigger": 2}, ValueError, r"^trigger: expected a value in \[0, 1\], got 2$"),
    "choice": ({"choice": "least"}, ValueError, r"^choice: expected 'smallest', .* got 'least'$"),
    "factor": ({"factor": 1.0}, ValueError, r"^factor: expected a value in \(0, 1\), got 1.0$"),
    "factor 2": ({"factor": 2.0}, ValueError, r"^factor: expected a value in \[0, 1\], got 2.0$"),
    "every": ({"every": 0}, ValueError, r"^every: expected"),
    "readmit": ({"readmit": 1}, TypeError, r"^readmit: expected a bool, got int$"),
    "shrink": ({"shrink": None}, TypeError, r"^shrink: expected a bool, got NoneType$"),
    "labels": ({"class_floor": 1}, ValueError, r"^labels: expected a tensor \[N\] with class_fl"),
    "floor": (
        {"class_floor": 2, "labels": LABELS},
        ValueError,
        r"^class_floor: expected at most num_kept, 5, samples for all classes, got 8$",
    ),
    "rescore": ({"rescore": 3}, TypeError, r"^rescore: expected a function, got int$"),
    "length": (
        {"shrink": True, "num_samples": 9},
        ValueError,
        r"^num_samples: expected None with shrink=True, got 9$",
    ),
    "long": ({"num_samples": 51}, ValueError, r"^num_samples: expected at most 50"),
    "budget": ({"budget": 0}, ValueError, r"^budget: expected"),
    "ranks": (
        {"num_replicas": 6, "rank": 0, "drop_last": True, "shrink": True},
        ValueError,
        r"^num_kept: expected at least num_replicas, 6, with drop_last, got 5$",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        ReductionSampler(**{"dynamics": TrainingDynamics(N), "num_kept": 5, **arguments})
