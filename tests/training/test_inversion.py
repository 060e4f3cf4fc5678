"""When classes stop contracting, who is misclassified then, and whether other runs agree."""

import math
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from marginops.commands.data import load_fashion_mnist
from marginops.ops.moments import class_moments
from marginops.training import InversionMonitor, straggler_stability

TARGET = torch.tensor([0, 0, 0, 1, 1, 1])
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def wrong(*rows):
    mask = torch.zeros(len(TARGET), dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def follow(radii, **options):
    """A monitor of one class after these epochs; in epoch t sample t - 1 is misclassified."""
    monitor = InversionMonitor(1, per_class=False, **options)
    for index, radius in enumerate(radii):
        monitor.update(torch.tensor([float(radius)]), torch.arange(len(radii)) == index)
    return monitor


@pytest.mark.parametrize(
    ("radii", "first_epoch", "epoch"),
    [
        ([5, 4, 3, 2, 1], 2, None),
        ([5, 4, 3, 4, 5], 2, 4),
        ([5, 4, 4, 3, 2], 2, 3),  # as large is no smaller
        ([5, 6, 5, 4, 5], 3, 5),  # too early to count
        ([5, 4, 5, 6, 5], 4, 4),  # compared with the epoch before the first that counts
        ([5, 4, 5, 4, 5], 4, 5),
        ([5], 2, None),
        ([5, math.nan, 4, 3, 4], 2, 5),
        ([5, 4, math.nan, 5, 5], 2, 5),
    ],
)
def test_inversion_is_where_the_radius_falls_no_more(radii, first_epoch, epoch):
    monitor = follow(radii, first_epoch=first_epoch)
    assert monitor.epoch == epoch
    assert monitor.inverted == (epoch is not None)
    if epoch is None:
        assert monitor.stragglers is None
    else:
        assert monitor.stragglers.nonzero().tolist() == [[epoch - 1]]
    history = torch.tensor(radii, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(monitor.history, history, equal_nan=True)


def test_the_first_epoch_is_the_twentieth():
    assert follow([1.0] * 19).epoch is None
    assert follow([1.0] * 25).epoch == 20


def test_class_0_decides_for_all():
    monitor = InversionMonitor(2, first_epoch=2, per_class=False)
    for radius, mask in [
        ([3.0, 1.0], wrong(0)),
        ([2.0, 2.0], wrong(1)),
        ([2.0, 1.0], wrong(2, 4)),
        ([3.0, 3.0], wrong(5)),
    ]:
        monitor.update(torch.tensor(radius), mask)
    assert monitor.epoch == 3
    assert torch.equal(monitor.stragglers, wrong(2, 4))


def test_classes_invert_by_themselves():
    monitor = InversionMonitor(3, first_epoch=2)
    assert monitor.history.shape == (0, 3)
    steps = [
        ([3.0, 3.0, 3.0], wrong(0, 3), [None, None, None], None),
        ([2.0, 2.0, 2.0], wrong(0, 3), [None, None, None], None),
        ([1.0, 2.0, 1.0], wrong(0, 4), [None, 3, None], wrong(4)),
        ([1.0, 3.0, 0.5], wrong(1, 2, 3, 5), [4, 3, None], wrong(1, 2, 4)),
        ([2.0, 4.0, 0.1], wrong(0, 3), [4, 3, None], wrong(1, 2, 4)),
        ([2.0, 4.0, 0.2], wrong(0, 3), [4, 3, 6], wrong(1, 2, 4)),
    ]
    for radius, mask, epochs, stragglers in steps:
        monitor.update(torch.tensor(radius), mask, TARGET)
        assert monitor.epoch == epochs
        if stragglers is None:
            assert monitor.stragglers is None
        else:
            assert torch.equal(monitor.stragglers, stragglers)
        assert monitor.inverted == (None not in epochs)


@pytest.mark.parametrize("per_class", [True, False])
def test_stragglers_are_a_copy(per_class):
    monitor = InversionMonitor(2, first_epoch=2, per_class=per_class)
    mask, radius = wrong(0, 3), torch.ones(2)
    target = TARGET if per_class else None
    for _ in range(2):
        monitor.update(radius, mask, target)
    mask.fill_(True)
    radius.fill_(9)
    monitor.stragglers.fill_(True)
    assert torch.equal(monitor.stragglers, wrong(0, 3))
    assert monitor.history.eq(1).all()


def test_ignored_samples_are_nobodys_stragglers():
    monitor = InversionMonitor(2, first_epoch=2)
    target = TARGET.where(TARGET == 1, -100)
    for _ in range(2):
        monitor.update(torch.ones(2), wrong(0, 3), target)
    assert torch.equal(monitor.stragglers, wrong(3))


def test_training_can_go_on_elsewhere(tmp_path):
    radii = torch.tensor([[3.0, 2.0, 2.0, 3.0, 3.0], [3.0, 2.0, 1.0, 0.5, 0.5]]).T
    masks = torch.rand(5, 6) < 0.5
    for stop in range(6):
        whole, first, second = (InversionMonitor(2, first_epoch=2) for _ in range(3))
        for epoch in range(5):
            whole.update(radii[epoch], masks[epoch], TARGET)
            if epoch == stop:
                torch.save(first.state_dict(), tmp_path / "state")
                second.load_state_dict(torch.load(tmp_path / "state"))
            (first if epoch < stop else second).update(radii[epoch], masks[epoch], TARGET)
        if stop == 5:
            second.load_state_dict(first.state_dict())
        assert second.epoch == whole.epoch == [3, 5]
        assert torch.equal(second.stragglers, whole.stragglers)
        assert torch.equal(second.history, whole.history)


def test_state_is_independent_of_the_monitor():
    monitor = follow([2, 2], first_epoch=2)
    state = monitor.state_dict()
    other = InversionMonitor(1, first_epoch=2, per_class=False)
    other.load_state_dict(state)
    monitor.update(torch.ones(1), torch.ones(2, dtype=torch.bool))
    state["stragglers"].fill_(True)
    state["epochs"][0] = 7
    assert other.epoch == 2
    assert len(other.history) == 2
    assert other.stragglers.tolist() == [False, True]
    with pytest.raises(
        ValueError, match=r"misclassified: expected shape \[2\] as before, got \[3\]"
    ):
        other.update(torch.ones(1), torch.ones(3, dtype=torch.bool))


def test_state_of_another_kind_of_monitor():
    state = InversionMonitor(2).state_dict()
    for other in (InversionMonitor(3), InversionMonitor(2, per_class=False)):
        with pytest.raises(ValueError, match=r"state_dict: expected .*got .*'num_classes': 2"):
            other.load_state_dict(state)


def monitored(per_class=True):
    """A monitor after five epochs, in which class 0 has inverted."""
    monitor = InversionMonitor(2, first_epoch=2, per_class=per_class)
    for epoch, radii in enumerate(
        ([3.0, 5.0], [2.0, 4.0], [2.5, 3.0], [2.0, 2.0], [3.0, math.nan])
    ):
        target = TARGET if per_class else None
        monitor.update(torch.tensor(radii), wrong(epoch), target)
    return monitor


def damaged_states(state):
    """The name of what is damaged, and the state."""
    for key in state:
        yield key, {name: value for name, value in state.items() if name != key}
        for value in ("x", 3.5, [], {}, torch.empty(1, device="meta")):
            yield key, {**state, key: value}
    yield "more", {**state, "more": 1}
    history = state["history"]
    for value in (
        *(None, history.tolist(), history.numpy(), history.float(), history[0], history[:, :1]),
        *(history.repeat(1, 2), history - 10, history[:2], history.to("meta"), history.to_sparse()),
        torch.zeros((), dtype=torch.float64).expand(2**33, 2),
    ):
        yield "history", {**state, "history": value}
    for epochs in (
        *(None, (3, None), [3], [3, None, None], [True, None], [3.0, None], [1, None], [2, None]),
        *([6, None], [4, None], [None, None], [3, 3], [-3, None], ["3", None], torch.tensor([3])),
    ):
        yield "epochs", {**state, "epochs": epochs}
    for population in (None, True, -6, 6.0, 5, 2**33, "6", torch.tensor(6)):
        yield "population", {**state, "population": population}
    mask = state["stragglers"]
    for value in (
        *(None, mask.long(), mask.tolist(), mask.numpy(), mask[:5], mask.repeat(2), mask[None]),
        *(mask.to("meta"), torch.zeros((), dtype=torch.bool).expand(6)),
    ):
        yield "stragglers", {**state, "stragglers": value}
    for name, value in (("num_classes", 2.0), ("first_epoch", 3), ("per_class", 1)):
        arguments = {**state["arguments"], name: value}
        yield "arguments", {**state, "arguments": arguments}
    empty = InversionMonitor(2, first_epoch=2).state_dict()
    yield "population", {**empty, "population": 6}
    yield "stragglers", {**empty, "stragglers": mask}


def test_a_damaged_state_changes_nothing():
    monitor, state = monitored(), monitored().state_dict()
    for key, damaged in damaged_states(state):
        words = {"more": "keys"}.get(key, "")
        with pytest.raises((TypeError, ValueError), match=f"state_dict: expected .*{words}"):
            monitor.load_state_dict(damaged)
        assert monitor.epoch == [3, None], key
        assert torch.equal(monitor.stragglers, wrong(2))
        assert torch.equal(monitor.history.nan_to_num(), state["history"].nan_to_num())
        assert monitor.state_dict()["population"] == 6
    for other in (None, [], "state", torch.ones(1)):
        with pytest.raises(TypeError, match="state_dict: expected a mapping, got"):
            monitor.load_state_dict(other)
    monitor.load_state_dict(state)


def test_states_of_all_stages_load():
    monitor = InversionMonitor(2, first_epoch=3)
    for radii in ([1.0, 2.0], [2.0, 1.0], [2.0, math.inf], [math.nan, math.inf], [0.0, 0.0]):
        InversionMonitor(2, first_epoch=3).load_state_dict(monitor.state_dict())
        monitor.update(torch.tensor(radii), wrong(1, 4), TARGET)
    other = InversionMonitor(2, first_epoch=3)
    other.load_state_dict(monitor.state_dict())
    assert other.epoch == monitor.epoch == [3, 3]
    one = monitored(per_class=False)
    other = InversionMonitor(2, first_epoch=2, per_class=False)
    other.load_state_dict(one.state_dict())
    assert other.epoch == one.epoch == 3
    InversionMonitor(1).load_state_dict(InversionMonitor(1).state_dict())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes: expected at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes: expected an int, got float"),
        ({"first_epoch": 1}, ValueError, "first_epoch: expected at least 2, got 1"),
        ({"first_epoch": True}, TypeError, "first_epoch: expected an int, got bool"),
        ({"per_class": 1}, TypeError, "per_class: expected a bool, got int"),
    ],
)
def test_bad_monitors(arguments, error, message):
    with pytest.raises(error, match=message):
        InversionMonitor(**{"num_classes": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"radius": [1.0, 2.0]}, TypeError, "radius: expected a tensor .C., got list"),
        ({"radius": torch.ones(3)}, ValueError, r"radius: expected shape \[2\], got \[3\]"),
        ({"radius": torch.ones(2).long()}, TypeError, "radius: expected dtype"),
        ({"misclassified": [True]}, TypeError, "misclassified: expected a tensor"),
        ({"misclassified": wrong().long()}, TypeError, "misclassified: expected dtype torch.bool"),
        ({"misclassified": wrong()[:5]}, ValueError, r"misclassified: expected shape \[6\] as"),
        ({"misclassified": wrong().view(2, 3)}, ValueError, "misclassified: expected shape"),
        ({"target": None}, ValueError, "target: expected a tensor .P. with per_class=True"),
        ({"target": TARGET[:5]}, ValueError, r"target: expected shape \[6\]"),
        ({"target": TARGET.float()}, TypeError, "target: expected dtype torch.int64"),
    ],
)
def test_bad_epochs_do_not_count(arguments, error, message):
    monitor = InversionMonitor(2, first_epoch=2)
    good = {"radius": torch.ones(2), "misclassified": wrong(1), "target": TARGET}
    monitor.update(**good)
    with pytest.raises(error, match=message):
        monitor.update(**{**good, **arguments})
    assert len(monitor.history) == 1
    with pytest.raises(ValueError, match="target: expected None with per_class=False"):
        InversionMonitor(2, per_class=False).update(**good)


def random_sets(count, population, size):
    return [set(torch.randperm(population)[:size].tolist()) for _ in range(count)]


def test_stability_by_counting():
    population = 50
    first, second = random_sets(6, population, 15), random_sets(6, population, 20)
    pairs = list(zip(first, second, strict=True))
    common = [len(a & b) for a, b in pairs]
    chance = statistics.mean(len(a) * len(b) / population for a, b in pairs)
    expected = (statistics.mean(common) - chance) / statistics.pstdev(common)
    indices = [list(a) for a in first], [torch.tensor(list(b)) for b in second]
    assert straggler_stability(*indices, population) == pytest.approx(expected, rel=1e-12)
    masks = [
        [torch.tensor([index in members for index in range(population)]) for members in sets]
        for sets in (first, second)
    ]
    assert straggler_stability(*masks, population) == pytest.approx(expected, rel=1e-12)


def test_independent_sets_are_as_chance_has_it():
    runs, size, population = 400, 40, 1000
    first, second = (
        [list(members) for members in random_sets(runs, population, size)] for _ in range(2)
    )
    # The mean of so many deviates by a twentieth of the deviation of one.
    assert abs(straggler_stability(first, second, population)) < 0.2


def test_equal_overlaps_have_no_deviation():
    empty = [[], torch.zeros(4, dtype=torch.bool)]
    assert straggler_stability([[0, 1], [2]], [[0, 2], [2, 3]], 4) == math.inf
    assert straggler_stability([[0], [1]], [[1], [2]], 4) == -math.inf
    assert math.isnan(straggler_stability(empty, empty, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0]], [[0]], 4), ValueError, "sets_a: expected at least 2 sets, got 1"),
        (([[0], [1]], [[0]], 4), ValueError, "sets_b: expected 2 sets as in sets_a, got 1"),
        (([[0], [4]], [[0], [1]], 4), ValueError, r"sets_a\[1\]: expected indices in \[0, 4\)"),
        (([[0], [1]], [[-1], [1]], 4), ValueError, r"sets_b\[0\]: expected indices in \[0, 4\)"),
        (([[0, 0], [1]], [[0], [1]], 4), ValueError, r"sets_a\[0\]: expected distinct indices"),
        (([[0.5], [1]], [[0], [1]], 4), TypeError, r"sets_a\[0\]: expected bool or integers"),
        (([[[0]], [1]], [[0], [1]], 4), ValueError, r"sets_a\[0\]: expected one dimension"),
        (([[True], [1]], [[0], [1]], 4), ValueError, r"sets_a\[0\]: expected a mask \[4\]"),
        (([[0], [1]], [[0], [1]], 0), ValueError, "population: expected at least 1, got 0"),
        (([[0], [1]], [[0], [1]], 4.0), TypeError, "population: expected an int, got float"),
    ],
)
def test_bad_sets(arguments, error, message):
    with pytest.raises(error, match=message):
        straggler_stability(*arguments)


def train_until_inversion(inputs, target, seed):
    """Full-batch gradient descent of an MLP with 20 tanh units, by the rule for two classes."""
    torch.manual_seed(seed)
    hidden, head = torch.nn.Linear(inputs.shape[1], 20), torch.nn.Linear(20, 2)
    optimizer = torch.optim.SGD([*hidden.parameters(), *head.parameters()], lr=0.1)
    monitor = InversionMonitor(2, per_class=False)
    while not monitor.inverted and len(monitor.history) < 250:
        features = torch.tanh(hidden(inputs))
        logits = head(features)
        moments = class_moments(features.detach(), target, 2, normalize=True)
        monitor.update(moments.radius, logits.argmax(1) != target)
        optimizer.zero_grad()
        F.cross_entropy(logits, target).backward()
        optimizer.step()
    return monitor


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.exists(), reason="needs the package dataset-fashion-mnist")
def test_runs_agree_on_the_stragglers():
    """The experiment of Ciceri et al. (2024): parity of the label, P = 8192, pixel by pixel."""
    torch.set_num_threads(1)  # two would wait for each other where cores are shared
    population = 8192
    data = load_fashion_mnist(FASHION_MNIST)
    inputs = data.train_inputs[:population].flatten(1)
    deviation, mean = torch.std_mean(inputs, dim=0, correction=0)
    inputs = (inputs - mean) / torch.where(deviation == 0, 1, deviation)
    target = data.train_target[:population] % 2
    runs = [train_until_inversion(inputs, target, seed) for seed in range(3)]
    for monitor in runs:
        assert monitor.inverted
        assert 40 < monitor.epoch < 200
        radius = monitor.history[:, 0]
        assert (radius[19:-1].diff() < 0).all()
        assert radius[-1] >= radius[-2]
        assert 0.02 < monitor.stragglers.double().mean() < 0.06
    first, second = zip(*[(0, 1), (0, 2), (1, 2)], strict=True)
    stragglers = [monitor.stragglers for monitor in runs]
    for a, b in zip(first, second, strict=True):
        common, union = stragglers[a] & stragglers[b], stragglers[a] | stragglers[b]
        assert common.sum() > 0.6 * union.sum()
    z = straggler_stability(
        [stragglers[run] for run in first], [stragglers[run] for run in second], population
    )
    print(
        f"inversion at epochs {[monitor.epoch for monitor in runs]}, "
        f"{[int(mask.sum()) for mask in stragglers]} stragglers, z = {z:.1f}"
    )
    assert z > 10
