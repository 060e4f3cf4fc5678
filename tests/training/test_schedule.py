"""Schedules of selection, and the step that keeps the closest share of a batch."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.classifiers import expected_choice, network_with_state
from marginops.networks import predict
from marginops.training import Indexed, SelectionSchedule, keep_closest, select_batch

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(40) % 4


def test_a_schedule_selects_from_begin_to_end_at_every_nth_step() -> None:
    schedule = SelectionSchedule(begin=4, end=11, every=3, candidate_ratio=2)
    assert [step for step in range(30) if schedule.is_active(step)] == [4, 7, 10]
    assert [schedule.ratio(step) for step in (3, 4, 5, 7, 11)] == [1, 2, 1, 2, 1]
    always = SelectionSchedule()
    assert all(always.is_active(step) for step in (0, 1, 10**9)) and always.ratio(5) == 10
    assert not any(SelectionSchedule(begin=3, end=3).is_active(step) for step in range(9))


def test_a_ratio_may_change_linearly() -> None:
    schedule = SelectionSchedule(begin=10, end=20, candidate_ratio=(2, 5))
    assert [schedule.ratio(step) for step in (9, 10, 15, 20)] == [1, 2, 3.5, 1]
    assert schedule.ratio(19) == pytest.approx(4.7)
    falling = SelectionSchedule(end=4, candidate_ratio=(5.0, 1.0))
    assert [falling.ratio(step) for step in range(5)] == [5, 4, 3, 2, 1]


def test_numbers_of_candidates_and_of_kept_samples() -> None:
    schedule = SelectionSchedule(begin=1, candidate_ratio=2.5)
    assert schedule.num_candidates(0, 128) == 128 and schedule.num_candidates(1, 128) == 320
    assert schedule.num_kept(0, 320) == 320 and schedule.num_kept(1, 320) == 128
    assert schedule.num_kept(1, 1) == 1, "a batch is never left empty"


def test_the_closest_share_of_every_part_of_the_batch_is_kept() -> None:
    network = network_with_state()
    schedule = SelectionSchedule(begin=1, candidate_ratio=4)
    names = [f"sample {row}" for row in range(40)]
    batch = {"x": X, "rest": (Y, names), "scale": 2.0}
    assert keep_closest(network, X, batch, step=0, schedule=schedule) is batch
    kept = keep_closest(network, X, batch, step=1, schedule=schedule)
    rows = expected_choice(predict(network, X), network[-1].weight, 10)
    assert torch.equal(kept["x"], X[rows]) and torch.equal(kept["rest"][0], Y[rows])
    assert kept["rest"][1] == [names[row] for row in rows] and kept["scale"] == 2.0
    skipped = keep_closest(network, X, Y, step=1, schedule=schedule, skip=3)
    assert torch.equal(skipped, Y[select_batch(network, X, 10, skip=3)])


def test_the_network_runs_once_without_gradient_and_not_at_all_outside_the_schedule() -> None:
    network = network_with_state()
    seen = []
    network.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    select_batch(network, X, 5)  # the check of the head
    seen.clear()
    schedule = SelectionSchedule(end=1, candidate_ratio=4)
    for step in (0, 1):
        keep_closest(network, X, (X, Y), step=step, schedule=schedule)
    assert seen == [False]


@pytest.mark.parametrize("evaluation", [True, False])
def test_a_training_step_changes_running_statistics_once(evaluation: bool) -> None:
    """The scoring pass leaves batch norm alone, so only the kept share is averaged in."""
    network, schedule = network_with_state(), SelectionSchedule(candidate_ratio=4)
    x, y = keep_closest(network, X, (X, Y), step=0, schedule=schedule, evaluation=evaluation)
    hidden = network[0](x).detach()
    F.cross_entropy(network(x), y).backward()
    assert network[1].num_batches_tracked == 1
    torch.testing.assert_close(network[1].running_mean, 0.1 * hidden.mean(0))


def test_training_leaves_generators_and_loaders_alone() -> None:
    """Nothing seeds numpy or random anew, and nothing changes the classes of torch."""
    loader = torch.utils.data.DataLoader
    before = dict(vars(loader))
    states = random.getstate(), np.random.get_state()[1].tolist()
    network, schedule = network_with_state(), SelectionSchedule(candidate_ratio=4)
    dataset = torch.utils.data.TensorDataset(X, Y)
    for x, y, indices in loader(Indexed(dataset), batch_size=20):
        for evaluation in (True, False):
            kept = keep_closest(
                network, x, (x, y, indices), step=0, schedule=schedule, evaluation=evaluation
            )
            assert torch.equal(kept[0], X[kept[2]])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert dict(vars(loader)) == before


def test_no_value_is_read_for_each_sample(monkeypatch) -> None:
    """Batches of tensors are selected and taken without ``item`` and ``tolist``."""
    network, schedule = network_with_state(), SelectionSchedule(candidate_ratio=4)
    keep_closest(network, X, (X, Y), step=0, schedule=schedule)
    calls = []
    for name in ("item", "tolist"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, method=method: calls.append(1) or method(self)
        )
    keep_closest(network, X, (X, Y), step=1, schedule=schedule)
    keep_closest(network, X, (X, Y), step=1, schedule=schedule, labels=Y, class_floor=1)
    assert calls == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"begin": -1}, ValueError, "begin: expected at least 0, got -1"),
        ({"begin": 5, "end": 4}, ValueError, "end: expected at least 5, got 4"),
        ({"every": 0}, ValueError, "every: expected at least 1, got 0"),
        ({"begin": 0.5}, TypeError, "begin: expected an int, got float"),
        ({"candidate_ratio": 0.1}, ValueError, "candidate_ratio: expected at least 1, got 0.1"),
        ({"candidate_ratio": float("nan")}, ValueError, "candidate_ratio: .* got nan"),
        ({"candidate_ratio": float("inf")}, ValueError, "candidate_ratio: .* got inf"),
        ({"candidate_ratio": "2"}, TypeError, "candidate_ratio: expected a number .*, got str"),
        ({"candidate_ratio": (1, 2)}, ValueError, "end: expected an int .* that changes, got None"),
        ({"candidate_ratio": (1, 2, 3), "end": 3}, ValueError, "expected two numbers, got 3"),
    ],
)
def test_errors_name_what_is_wrong(options, error, message) -> None:
    with pytest.raises(error, match=message):
        SelectionSchedule(**options)


def test_a_batch_of_another_size_than_its_inputs_is_refused() -> None:
    network, schedule = nn.Linear(6, 4), SelectionSchedule(candidate_ratio=4)
    with pytest.raises(ValueError, match="inputs: expected 10 samples as in batch, got 40"):
        keep_closest(network, X, Y[:10], step=0, schedule=schedule)
    with pytest.raises(ValueError, match="inputs: expected 10 samples as in batch, got 40"):
        keep_closest(network, None, Y[:10], step=0, schedule=schedule, logits=network(X))


def test_ready_logits_need_no_forward_pass() -> None:
    network, schedule = network_with_state().eval(), SelectionSchedule(candidate_ratio=4)
    expected = keep_closest(network, X, Y, step=0, schedule=schedule)
    logits = network(X)
    network.register_forward_hook(lambda *_: pytest.fail("the network has run"))
    kept = keep_closest(network, None, Y, step=0, schedule=schedule, logits=logits)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (0.5, TypeError, "step: expected an int, got float"),
        ("0", TypeError, "step: expected an int, got str"),
        (-1, ValueError, "step: expected at least 0, got -1"),
    ],
)
def test_a_wrong_step_is_named(step, error, message) -> None:
    with pytest.raises(error, match=message):
        SelectionSchedule().is_active(step)
