"""WeightedSampler: replicas, positions, states, loaders, and wrong arguments."""

import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.utils.data import DataLoader, DistributedSampler

from marginops.training import WeightedSampler
from marginops.training.samplers import epoch_sampler

WEIGHTS = torch.tensor([1.0, 0.0, 2.0, math.inf, 0.5, 3.0, 1.0, 9.0, 0.1, 4.0, 1.0, 1.0])


def sampler(**arguments: Any) -> WeightedSampler:
    return WeightedSampler(**{"weights": WEIGHTS, "num_samples": 8, "seed": 5, **arguments})


def epoch_of(one: WeightedSampler, epoch: int) -> list[int]:
    one.set_epoch(epoch)
    ids = list(one)
    assert one.indices().tolist() == ids
    return ids


def interleave(shares: list[list[int]]) -> list[int]:
    return [sample for step in zip(*shares, strict=True) for sample in step]


@given(
    st.integers(1, 30), st.integers(1, 5), st.booleans(), st.integers(0, 3), st.integers(0, 2**40)
)
def test_ranks_share_the_order_of_one_process(
    size: int, ranks: int, drop_last: bool, epoch: int, seed: int
) -> None:
    if drop_last and size < ranks:
        return
    options = {"weights": torch.ones(30), "num_samples": size, "seed": seed}
    whole = epoch_of(sampler(**options), epoch)
    options |= {"num_replicas": ranks, "drop_last": drop_last}
    shares = [epoch_of(sampler(rank=rank, **options), epoch) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    joined = interleave(shares)
    if drop_last:
        assert joined == whole[: size - size % ranks]
    else:
        assert joined[:size] == whole
        # The other ranks of the last step repeat what the first ones visit in it.
        first = size - (size % ranks or ranks)
        assert joined[size:] == list(
            itertools.islice(itertools.cycle(whole[first:]), -size % ranks)
        )
    # The rule for the ends is that of torch.
    oracle = DistributedSampler(range(size), ranks, 0, shuffle=False, drop_last=drop_last)
    assert len(sampler(rank=0, **options)) == len(shares[0]) == len(oracle)
    assert shares[0] == [whole[place] for place in oracle]


@given(st.data())
def test_a_run_goes_on_after_any_sample_on_any_number_of_ranks(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 24))
    options = {"weights": torch.ones(24), "num_samples": size}
    whole = epoch_of(sampler(**options), 2)
    seen: list[int] = []
    state = sampler(**options).state_dict() | {"epoch": 2}
    while len(seen) < size:
        ranks, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        group = [sampler(num_replicas=ranks, rank=rank, **options) for rank in range(ranks)]
        for one in group:
            one.load_state_dict(state)
            one.set_epoch(2)
        seen += interleave([list(itertools.islice(one, steps)) for one in group])
        states = [one.state_dict(position=len(seen)) for one in group]
        assert all(other == states[0] for other in states)
        state = states[0]
    assert seen[:size] == whole
    last = sampler(**options)
    last.load_state_dict(state)
    assert list(last) == []
    assert epoch_of(last, 3) == epoch_of(sampler(**options), 3)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("ranks", [1, 3])
def test_chunks_of_ids_change_nothing(
    chunk: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sampler(weights=torch.ones(31), num_samples=31, num_replicas=ranks)
    expected = list(one)
    monkeypatch.setattr(epoch_sampler, "_CHUNK", chunk)
    iterator = iter(one)
    for place, sample in enumerate(iterator, 1):
        assert sample == expected[place - 1]
        state = iterator.state_dict()
        assert state["position"] == min(place * ranks, 31)
        resumed = iter(one)
        resumed.load_state_dict(state)
        assert list(resumed) == expected[place:]
    assert place == len(expected)


@pytest.mark.parametrize("stop", [0, 1, 5, 8])
def test_an_iterator_knows_its_position(stop: int) -> None:
    one = sampler()
    one.set_epoch(4)
    whole = list(one)
    iterator = iter(one)
    assert [next(iterator) for _ in range(stop)] == whole[:stop]
    state = iterator.state_dict()
    assert state["position"] == stop
    assert state == one.state_dict(position=stop)
    other = sampler()
    other.load_state_dict(one.state_dict())
    resumed = iter(other)
    resumed.load_state_dict(state)
    assert list(resumed) == whole[stop:] == list(iterator)
    assert all(type(value) is int for value in state.values())


def test_iteration_has_no_side_effects() -> None:
    one = sampler()
    state = one.state_dict()
    first, second = iter(one), iter(one)
    assert next(first) == next(second)
    assert list(one) == list(one)
    assert one.state_dict() == state
    assert not hasattr(one, "generator")


def test_an_iterator_keeps_its_epoch() -> None:
    one = sampler()
    expected = epoch_of(one, 0)
    iterator = iter(one)
    one.set_epoch(1)
    assert list(iterator) == expected != list(one)


def test_a_loaded_position_lasts_for_its_epoch() -> None:
    one = sampler()
    whole = epoch_of(one, 1)
    one.load_state_dict(one.state_dict(position=3))
    assert list(one) == list(one) == whole[3:]
    assert epoch_of(one, 1) == whole[3:]
    assert len(epoch_of(one, 2)) == 8
    assert epoch_of(one, 1) == whole
    assert len(one) == 8


def test_it_is_a_distributed_sampler() -> None:
    """Hosts leave such a sampler alone, and read its attributes."""
    one = sampler(num_replicas=3, rank=1)
    assert isinstance(one, DistributedSampler)
    assert (one.num_replicas, one.rank, one.num_samples, one.total_size) == (3, 1, 3, 9)
    assert (one.epoch, one.seed, one.drop_last, one.epoch_size, one.population) == (
        *(0, 5, False),
        *(8, 12),
    )


def test_the_default_visits_all_positive_weights() -> None:
    assert sorted(WeightedSampler(WEIGHTS)) == [0, *range(2, 12)]


def test_weights_are_copied() -> None:
    weights = WEIGHTS.clone()
    one = sampler(weights=weights)
    before = list(one)
    weights.zero_()
    assert list(one) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_weights(dtype: torch.dtype) -> None:
    weights = torch.tensor([1.0, 0.5, math.inf, 0.0, 0.25] * 4)
    assert list(WeightedSampler(weights.to(dtype), 9)) == list(WeightedSampler(weights, 9))


def test_the_smallest_positive_weight_stays_positive() -> None:
    weights = torch.tensor([0.0, 1e-45, 3e38])
    assert sorted(WeightedSampler(weights)) == [1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_takes_its_order(workers: int) -> None:
    one = sampler(weights=torch.ones(50), num_samples=20)
    loader = DataLoader(torch.arange(50), batch_size=6, sampler=one, num_workers=workers)
    for epoch in range(2):
        one.set_epoch(epoch)
        batches = [batch.tolist() for batch in loader]
        assert [len(batch) for batch in batches] == [6, 6, 6, 2]
        assert list(itertools.chain(*batches)) == list(one)
    assert len(loader) == 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_stateful_loader_resumes(workers: int, stop: int) -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> tuple[WeightedSampler, Any]:
        one = sampler(weights=torch.arange(50.0), num_samples=20)
        data = torch.arange(50)
        return one, loaders.StatefulDataLoader(data, 6, sampler=one, num_workers=workers)

    one, batches = loader()
    one.set_epoch(3)
    expected = [batch.tolist() for batch in batches]
    iterator = iter(batches)
    for _ in range(stop):
        next(iterator)
    state = pickle.loads(pickle.dumps(batches.state_dict()))
    one, batches = loader()
    batches.load_state_dict(state)
    assert [batch.tolist() for batch in batches] == expected[stop:]
    one.set_epoch(4)
    again, plain = loader()
    again.set_epoch(4)
    assert [b.tolist() for b in batches] == [b.tolist() for b in plain]


def test_pickled_samplers_and_iterators_go_on() -> None:
    one = sampler(num_replicas=2, rank=1)
    one.set_epoch(3)
    assert list(pickle.loads(pickle.dumps(one))) == list(one)


def test_a_state_of_other_weights_is_an_error() -> None:
    state = sampler().state_dict(position=2)
    with pytest.raises(ValueError, match=r"^state_dict: .* same weights, got one with other"):
        sampler(weights=WEIGHTS + 1).load_state_dict(state)


STATE_ERRORS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "list": (lambda s: list(s), TypeError, "state_dict: expected a mapping, got list"),
    "missing": (
        lambda s: {name: s[name] for name in s if name != "epoch"},
        ValueError,
        "state_dict: expected the keys version, seed, epoch, position, weights_version, got ",
    ),
    "version": (lambda s: s | {"version": 2}, ValueError, "expected version 1, got 2"),
    "seed": (lambda s: s | {"seed": 6}, ValueError, "expected seed 5, got 6; make the sampler"),
    "bool": (lambda s: s | {"epoch": True}, TypeError, "expected epoch as an int, got bool"),
    "tensor": (
        lambda s: s | {"position": torch.tensor(1)},
        TypeError,
        "expected position as an int, got Tensor",
    ),
    "epoch": (lambda s: s | {"epoch": -1}, ValueError, r"an epoch in \[0, 2\*\*63\), got -1"),
    "position": (lambda s: s | {"position": 9}, ValueError, r"a position in \[0, 8\], got 9"),
    "negative": (lambda s: s | {"position": -1}, ValueError, r"a position in \[0, 8\], got -1"),
    "weights": (lambda s: s | {"weights_version": -2}, ValueError, "weights_version >= -1, got -2"),
}


@pytest.mark.parametrize("case", STATE_ERRORS)
def test_damaged_states_are_errors(case: str) -> None:
    change, error, message = STATE_ERRORS[case]
    one = sampler()
    one.set_epoch(2)
    state = one.state_dict(position=3)
    before = sampler()
    for target in (before, iter(before)):
        with pytest.raises(error, match=message):
            target.load_state_dict(change(state))
    assert list(before) == list(sampler())


def test_an_iterator_takes_no_state_of_another_epoch() -> None:
    one = sampler()
    one.set_epoch(1)
    state = one.state_dict()
    with pytest.raises(ValueError, match=r"expected the state of epoch 0 .* got epoch 1"):
        iter(sampler()).load_state_dict(state)


NAN = WEIGHTS.clone()
NAN[2] = torch.nan
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "list": ({"weights": [1.0]}, TypeError, r"^weights: expected a tensor \[N\], got list"),
    "integers": ({"weights": torch.ones(9).long()}, TypeError, r"^weights: expected dtype float32"),
    "matrix": ({"weights": torch.ones(9, 1)}, ValueError, r"^weights: expected shape \[N\]"),
    "empty": ({"weights": torch.ones(0)}, ValueError, r"^weights: expected a positive weight"),
    "zeros": (
        {"weights": torch.zeros(9)},
        ValueError,
        r"^weights: expected a positive weight, got 9 weights of 0$",
    ),
    "negative": (
        {"weights": -torch.ones(9)},
        ValueError,
        r"^weights: expected numbers in \[0, inf\], got -1.0 for sample 0$",
    ),
    "nan": ({"weights": NAN}, ValueError, r"^weights: .* got nan for sample 2$"),
    "too many": (
        {"num_samples": 12},
        ValueError,
        r"^weights: expected at least num_samples, 12, positive weights, got 11$",
    ),
    "above N": ({"num_samples": 13}, ValueError, r"^weights: expected at least num_samples, 13, "),
    "too few": (
        {"weights": torch.full((9,), torch.inf)},
        ValueError,
        r"^weights: expected at most num_samples, 8, infinite weights, got 9$",
    ),
    "none": ({"weights": WEIGHTS[:3], "num_samples": 0}, ValueError, r"^num_samples: .* got 0"),
    "share": ({"num_samples": 0.4}, TypeError, r"^num_samples: expected an int, got float"),
    "seed": ({"seed": -1}, ValueError, r"^seed: expected .*, got -1"),
    "large seed": ({"seed": 2**63}, ValueError, r"^seed: expected an int below 2\*\*63"),
    "seed text": ({"seed": "a"}, TypeError, r"^seed: expected an int, got str"),
    "replicas": ({"num_replicas": 0}, ValueError, r"^num_replicas: expected"),
    "rank": ({"rank": 1}, ValueError, r"^rank: expected an int below num_replicas, 1, got 1$"),
    "negative rank": ({"rank": -1}, ValueError, r"^rank: expected"),
    "drop_last": ({"drop_last": 1}, TypeError, r"^drop_last: expected a bool, got int$"),
    "nothing left": (
        {"drop_last": True, "num_replicas": 9},
        ValueError,
        r"^num_samples: expected at least num_replicas, 9, with drop_last, got 8$",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_named(case: str) -> None:
    arguments, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        sampler(**arguments)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (2**63, ValueError),
        (1.0, TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_wrong_epochs_and_positions_are_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^epoch: expected"):
        sampler().set_epoch(value)
    if value is not None:
        with pytest.raises(error, match=r"^position: expected"):
            sampler().state_dict(position=value)


def test_a_position_of_several_epochs_is_an_error() -> None:
    one = sampler(num_replicas=3)
    assert one.state_dict(position=10)["position"] == 8
    with pytest.raises(ValueError, match=r"^position: expected at most 10, .*; count the samples"):
        one.state_dict(position=11)
