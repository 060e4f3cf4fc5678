"""Options of batch selection: ready logits, mask, skip, class floors, training mode."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

from helpers import brute_force
from helpers.classifiers import BodyAndHead, expected_choice, network_with_state, returning_logits
from marginops import minimal_margin_score
from marginops.training import score_batch, select_batch

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
COLUMN = torch.tensor([[1.0], [0.0]])


def chosen_by_hand(scores, k, mask, skip, labels, floor) -> list[int]:
    """The rule of ``class_floor`` in plain loops."""
    order = brute_force.select_smallest(scores, len(scores))
    order = [index for index in order if mask[index]][skip:]
    preferred, others, seen = [], [], {}
    for index in order:
        seen[labels[index]] = seen.get(labels[index], 0) + 1
        (preferred if seen[labels[index]] <= floor else others).append(index)
    kept = (preferred + others)[:k]
    return [index for index in order if index in kept]


@st.composite
def cases(draw):
    count = draw(st.integers(1, 25))

    def several(values):
        return draw(st.lists(values, min_size=count, max_size=count))

    margins = several(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, torch.inf, torch.nan]))
    mask, labels = several(st.booleans()), several(st.integers(-1, 3))
    skip = draw(st.integers(0, sum(mask)))
    k = draw(st.integers(0, sum(mask) - skip))
    return margins, k, mask, skip, labels, draw(st.integers(1, 4))


@given(cases())
def test_a_selection_with_floors_follows_its_rule(case) -> None:
    margins, k, mask, skip, labels, floor = case
    logits = torch.tensor([[margin, 0.0] for margin in margins])
    options = {"mask": torch.tensor(mask), "skip": skip}
    floors = {"labels": torch.tensor(labels), "class_floor": floor}
    chosen = select_batch(None, None, k, logits=logits, weight=COLUMN, **options, **floors)
    assert chosen.tolist() == chosen_by_hand(*case)
    chosen = select_batch(None, None, k, logits=logits, weight=COLUMN, **options)
    assert chosen.tolist() == chosen_by_hand(margins, k, mask, skip, labels, 0)
    chosen = select_batch(None, None, k, logits=logits, weight=COLUMN, skip=skip)
    assert chosen.tolist() == brute_force.select_smallest(margins, skip + k)[skip:]


def test_every_class_gets_its_floor_if_k_allows_it() -> None:
    labels = torch.arange(40) % 4
    labels[5] = 7
    network = network_with_state()
    plain = select_batch(network, INPUTS, 9)
    chosen = select_batch(network, INPUTS, 9, labels=labels, class_floor=2)
    assert labels[chosen].bincount().tolist()[:4] >= [2] * 4 and 5 in chosen
    assert not torch.equal(plain, chosen)
    scores = score_batch(network, INPUTS)[chosen]
    assert torch.equal(scores, scores.sort().values), "the closest comes first"


@pytest.mark.parametrize("fused", [True, False])
def test_mask_and_skip_choose_among_the_candidates(fused: bool, device: str) -> None:
    network = network_with_state(device)
    if not fused:
        network.append(nn.Identity())
    inputs = INPUTS.to(device)
    order = select_batch(network, inputs, 40).tolist()
    mask = torch.arange(40, device=device) % 3 > 0
    assert select_batch(network, inputs, 5, skip=7).tolist() == order[7:12]
    expected = [index for index in order if mask[index]][2:7]
    assert select_batch(network, inputs, 5, mask=mask, skip=2).tolist() == expected


def test_ready_logits_choose_as_the_network_does() -> None:
    network = BodyAndHead(returning_logits)
    network.head = parametrizations.weight_norm(network.head)
    logits = network(INPUTS)
    assert logits.requires_grad
    expected = expected_choice(logits, network.head.weight, 7)
    runs = []
    network.register_forward_hook(lambda *_: runs.append(1))
    for arguments in (
        {"network": network},
        {"network": network, "head": network.head},
        {"network": None, "head": network.head},
        {"network": network, "weight": network.head.weight},
        {"network": None, "weight": network.head.weight.double()},
    ):
        chosen = select_batch(**arguments, inputs=None, k=7, logits=logits)
        assert torch.equal(chosen, expected) and not chosen.requires_grad
    assert runs == []
    scores = score_batch(network, logits=logits, bias_in_norm=True)
    expected = minimal_margin_score(
        logits, network.head.weight, network.head.bias, bias_in_norm=True
    )
    assert torch.equal(scores, expected) and not scores.requires_grad


class Noisy(nn.Module):
    """In training it replaces a buffer in each forward pass, and counts in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("none", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.last = x.detach().sum()
            self.count += 1
        return x


@pytest.mark.parametrize("evaluation", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("given_head", [True, False])
def test_scoring_changes_no_state_in_any_mode(evaluation, fused, given_head) -> None:
    network = network_with_state()
    network.insert(2, Noisy())
    network.insert(3, parametrizations.spectral_norm(nn.Linear(12, 12)))
    head = network[-1]
    if not fused:
        network.append(nn.Identity())
    network[0].eval()
    names = [name for name, _ in network.named_buffers()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    objects = [id(buffer) for buffer in network.buffers()]
    modes = [module.training for module in network.modules()]
    random_state = torch.get_rng_state()
    for _ in range(2):
        select_batch(network, INPUTS, 5, evaluation=evaluation, head=head if given_head else None)
        after = network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert [id(buffer) for buffer in network.buffers()] == objects
        assert [name for name, _ in network.named_buffers()] == names
        assert [module.training for module in network.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("given_head", [True, False])
def test_training_mode_scores_with_the_statistics_of_the_batch(fused, given_head) -> None:
    network = network_with_state()
    network[3] = nn.Identity()
    head = network[-1]
    if not fused:
        network.append(nn.Identity())
    options = {"head": head} if given_head else {}
    in_training = select_batch(network, INPUTS, 7, evaluation=False, **options)
    in_evaluation = select_batch(network, INPUTS, 7, **options)
    assert not torch.equal(in_training, in_evaluation), "the modes make no difference here"
    assert torch.equal(in_training, expected_choice(network(INPUTS), head.weight, 7))


def test_buffers_are_restored_after_an_error() -> None:
    network = network_with_state()
    network[3] = nn.Linear(5, 12)
    mean = network[1].running_mean.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        select_batch(network, INPUTS, 5, evaluation=False)
    assert torch.equal(network[1].running_mean, mean)


def test_floors_read_no_tensor_value() -> None:
    with FakeTensorMode():
        network, labels = nn.Linear(6, 4), torch.zeros(40, dtype=torch.int64)
        inputs = torch.zeros(40, 6)
        assert select_batch(network, inputs, 5, labels=labels, class_floor=1).shape == (5,)


LOGITS = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
LABELS = torch.zeros(40, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"logits": LOGITS}, ValueError, "inputs: expected None with logits=, got Tensor"),
        ({"network": None}, TypeError, "network: expected a .*Module, got NoneType"),
        (
            {"network": None, "inputs": None, "logits": LOGITS},
            ValueError,
            "network: expected a torch.nn.Module, or head= or weight= beside logits=, got None",
        ),
        (
            {"inputs": None, "logits": LOGITS[0]},
            ValueError,
            r"\[B, C\], got \[4\]",
        ),
        ({"labels": LABELS}, ValueError, "class_floor: expected labels and class_floor together"),
        ({"class_floor": 1}, ValueError, "labels: expected labels and class_floor together"),
        ({"class_floor": -1, "labels": LABELS}, ValueError, "class_floor: expected at least 0"),
        ({"class_floor": 1, "labels": LABELS[1:]}, ValueError, r"labels: .* \[40\] .* got \[39\]"),
        ({"class_floor": 1, "labels": LABELS.int()}, TypeError, "labels: expected .*int64"),
        ({"mask": LABELS > 0}, ValueError, "k: expected 0 <= k <= 0 .*that mask allows"),
        (
            {"mask": LABELS == 0, "skip": 38, "labels": LABELS, "class_floor": 1},
            ValueError,
            r"k: .* <= 2 \(the number of candidates that mask allows after skip\), got 5",
        ),
        ({"skip": 36}, ValueError, r"k: .* <= 4 \(the number of candidates after skip\), got 5"),
        ({"skip": 41}, ValueError, r"skip: expected at most 40 \(the number of candidates\)"),
    ],
)
def test_errors_name_what_is_wrong(options, error, message) -> None:
    arguments = {"network": network_with_state(), "inputs": INPUTS, "k": 5}
    with pytest.raises(error, match=message):
        select_batch(**{**arguments, **options})


@pytest.mark.parametrize("options", [{}, {"skip": 3}, {"mask": LABELS == 0}])
def test_one_class_needs_no_floor(options) -> None:
    network = network_with_state()
    floored = select_batch(network, INPUTS, 4, labels=LABELS, class_floor=2, **options)
    assert torch.equal(floored, select_batch(network, INPUTS, 4, **options))
