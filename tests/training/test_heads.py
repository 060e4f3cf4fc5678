"""Whether the logits follow from the weight of the head: which networks are refused, and when."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from helpers.classifiers import BodyAndHead, compiled, data_parallel, expected_choice
from marginops.networks import predict
from marginops.training import select_batch
from marginops.training.selection import heads

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
REFUSED = "head: expected logits F.linear.* up to a constant in each row, got a difference of"


def network_with(
    after: Callable[[Tensor], Tensor] = lambda logits: logits,
    head: nn.Module | None = None,
    call: Callable[[nn.Module, Tensor], Tensor] = lambda head, features: head(features),
) -> BodyAndHead:
    """A network that changes its logits with ``after``, or has another head, or calls it so."""
    network = BodyAndHead(
        lambda network, inputs: after(
            call(network.head, network.body(inputs.to(dtype_of(network))))
        )
    )
    network.head = head or network.head
    return network


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


class Cosine(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight))


class Adapted(nn.Module):
    """A layer with an adapter of low rank, as LoRA adds it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2) / 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + input @ self.down.T @ self.up.T

    def merged(self) -> Tensor:
        return self.base.weight + self.up @ self.down


def hooked(hook: Callable[..., Any]) -> BodyAndHead:
    network = network_with()
    network.head.register_forward_hook(hook)
    return network


def patched() -> BodyAndHead:
    network = network_with()
    network.head.forward = lambda features: F.linear(features, -network.head.weight)
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda: network_with(head=Cosine(8, 4)),
        lambda: network_with(head=Adapted(nn.Linear(8, 4))),
        lambda: network_with(lambda logits: 1.5 * logits),
        lambda: network_with(lambda logits: logits.softmax(1)),
        lambda: network_with(lambda logits: 3 * (logits / 3).tanh()),
        lambda: network_with(lambda logits: (2 * logits).log_softmax(1)),
        lambda: network_with(lambda logits: logits + torch.arange(4)),
        lambda: hooked(lambda _, arguments, output: -output),
        patched,
        lambda: network_with(call=lambda head, h: head(h) + head(h.flip(1))),
        lambda: network_with(call=lambda head, h: head(torch.stack((h, -h), 1)).amax(1)),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Cosine(8, 4)),
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)),
        lambda: compiled(network_with(lambda logits: logits.softmax(1))),
        lambda: data_parallel(network_with(lambda logits: logits.softmax(1))),
    ],
)
def test_logits_that_do_not_follow_from_the_weight_are_refused(make) -> None:
    network = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{REFUSED} .*; merge .* head=, .* weight=, "):
            select_batch(network, INPUTS.to(next(network.parameters()).device), 5)


@pytest.mark.parametrize(
    "make",
    [
        network_with,
        lambda: network_with(lambda logits: logits.log_softmax(1)),
        lambda: network_with(lambda logits: logits.double()),
        lambda: network_with(call=lambda head, features: head(input=features)),
        lambda: network_with(call=lambda head, h: (head(-h), head(h))[1]),
        lambda: network_with(call=lambda head, h: head(torch.stack((h, -h), 1))[:, 1]),
        lambda: network_with(call=lambda head, h: head(torch.stack((h, -h / 2), 1)).mean(1)),
        lambda: network_with(head=parametrizations.weight_norm(nn.Linear(8, 4))),
        lambda: network_with(head=parametrizations.spectral_norm(nn.Linear(8, 4))),
        lambda: network_with(head=weight_norm(nn.Linear(8, 4))),
        lambda: network_with(head=spectral_norm(nn.Linear(8, 4))),
        lambda: network_with(head=nn.Linear(8, 4).requires_grad_(False)),
        lambda: compiled(network_with()),
        lambda: network_with().bfloat16(),
        lambda: network_with().half(),
        lambda: network_with().double(),
        lambda: network_with(lambda logits: logits.float()).half(),
    ],
)
def test_logits_that_follow_from_the_weight_are_scored(make) -> None:
    network = make()
    chosen = select_batch(network, INPUTS, 5)
    head = getattr(network, "_orig_mod", network).head
    assert torch.equal(chosen, expected_choice(predict(network, INPUTS), head.weight, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 1024])
def test_autocast_rounds_and_does_not_refuse(dtype: torch.dtype, width: int) -> None:
    right = [lambda logits: logits, lambda logits: logits.log_softmax(1), lambda f: f.float()]
    for after in [*right, lambda logits: 1.5 * logits]:
        network = network_with(after, head=nn.Linear(width, 4))
        network.body[2] = nn.Linear(12, width)
        with torch.autocast("cpu", dtype=dtype):
            if after in right:
                assert len(select_batch(network, INPUTS, 5)) == 5
            else:
                with pytest.raises(ValueError, match=REFUSED):
                    select_batch(network, INPUTS, 5)


def test_a_head_outside_of_autocast_is_compared_in_its_own_dtype() -> None:
    def call(head: nn.Module, features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return head(features.float())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(select_batch(network_with(call=call), INPUTS, 5)) == 5


def test_probabilities_are_named() -> None:
    with pytest.raises(ValueError, match="the logits look like probabilities"):
        select_batch(network_with(lambda logits: logits.softmax(1)), INPUTS, 5)


def test_features_of_other_rows_are_named() -> None:
    network = network_with(call=lambda head, features: head(features[1:]).repeat(2, 1)[:40])
    with pytest.raises(
        ValueError, match=r"got logits \[40, 4\] for features \[39, 8\] and weight \[4, 8\]; merge"
    ):
        select_batch(network, INPUTS, 5)


def test_logits_of_a_subclass_are_checked() -> None:
    class Named(Tensor):
        """As the tensors of libraries that keep metadata."""

    network = network_with(lambda logits: logits.softmax(1))
    with pytest.raises(ValueError, match=REFUSED):
        select_batch(network, INPUTS.as_subclass(Named), 5)


def test_a_weight_that_is_passed_is_the_one_used() -> None:
    network = network_with(head=Adapted(nn.Linear(8, 4)))
    weight = network.head.merged()
    chosen = select_batch(network, INPUTS, 5, weight=weight)
    assert torch.equal(chosen, expected_choice(predict(network, INPUTS), weight, 5))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    other = torch.randn(4, 3, dtype=torch.float64)
    chosen = select_batch(plain, INPUTS, 5, weight=other)
    assert torch.equal(chosen, expected_choice(predict(plain, INPUTS), other, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": nn.Linear(8, 4), "weight": torch.ones(4, 8)}, "weight: expected head=None"),
        ({"bias_in_norm": True, "weight": torch.ones(4, 8)}, "weight: expected bias_in_norm=False"),
        ({"weight": torch.ones(8, 4)}, r"weight: expected 4 rows .*; pass weight\.t\(\)"),
        ({"weight": torch.ones(3, 8)}, "weight: expected 4 rows"),
        ({"head": nn.Linear(8, 4)}, "head: expected network to call this layer at least once"),
    ],
)
def test_a_wrong_weight_or_head_is_named(options, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        select_batch(network_with(), INPUTS, 5, **options)


def runs_of(network: nn.Module, calls: int, **options: Any) -> list[int]:
    """How often the body runs in each of several calls."""
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    hook = network.body.register_forward_hook(add)
    runs = []
    for _ in range(calls):
        before = count
        select_batch(network, INPUTS, 5, **options)
        runs.append(count - before)
    hook.remove()
    return runs


def test_the_check_runs_once_for_a_network_and_head() -> None:
    network = network_with()
    assert runs_of(network, 3) == [3, 1, 1]
    assert runs_of(copy.deepcopy(network), 2) == [3, 1], "another network"
    network.head = nn.Linear(8, 4)
    assert runs_of(network, 2) == [3, 1], "another head"
    other = network_with(lambda logits: logits.log_softmax(1))
    assert runs_of(other, 2, head=other.head) == [2, 1], "the head is known before the first run"


class Scaled(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.ones(sizes[1], 1))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.scale * self.weight, self.bias)


def new_adapter() -> Adapted:
    """An adapter without effect before training."""
    adapter = Adapted(nn.Linear(8, 4))
    nn.init.zeros_(adapter.up)
    return adapter


def with_temperature() -> BodyAndHead:
    network = network_with(lambda logits: logits * network.temperature)
    network.temperature = nn.Parameter(torch.ones(()))
    return network


@pytest.mark.parametrize(
    "make",
    [
        lambda: network_with(head=new_adapter()),
        lambda: network_with(head=new_adapter()).bfloat16(),
        lambda: network_with(head=Scaled(8, 4)),
        with_temperature,
        lambda: compiled(with_temperature()),
    ],
)
def test_what_training_makes_of_the_logits_is_checked_before_training(make) -> None:
    network = make()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"whatever values .* no effect yet; merge"):
            select_batch(network, INPUTS, 5)


def test_what_training_does_not_change_is_no_objection() -> None:
    network = network_with(head=new_adapter())
    network.head.up.requires_grad_(False)
    chosen = select_batch(network, INPUTS, 5)
    assert torch.equal(
        chosen, expected_choice(predict(network, INPUTS), network.head.base.weight, 5)
    )


@pytest.mark.parametrize("wrap", [lambda layer: layer, prune.identity, weight_norm])
def test_the_check_changes_nothing_in_the_network(wrap) -> None:
    network = network_with(head=wrap(nn.Linear(8, 4), *["weight"][: wrap is prune.identity]))
    loss = network(INPUTS).square().sum()  # its gradient needs the parameters unchanged
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weight, state = network.head.weight.clone(), torch.get_rng_state()
    select_batch(network, INPUTS, 5)
    assert torch.equal(network.head.weight, weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    loss.backward()


def test_a_network_that_refuses_other_parameters_is_used_as_it_is() -> None:
    network = network_with(lambda logits: logits if (network.share == 1).all() else logits[0])
    network.share = nn.Parameter(torch.ones(()))
    assert runs_of(network, 2) == [3, 1]


def test_a_change_of_the_head_is_checked_again() -> None:
    network = network_with()
    select_batch(network, INPUTS, 5)
    hook = network.head.register_forward_hook(lambda _, arguments, output: 2 * output)
    with pytest.raises(ValueError, match=REFUSED):
        select_batch(network, INPUTS, 5)
    hook.remove()
    select_batch(network, INPUTS, 5)
    network.head = Adapted(network.head)
    with pytest.raises(ValueError, match=r"of Linear 'head\.base'"):
        select_batch(network, INPUTS, 5)


@pytest.mark.parametrize("rows", [0, 40])
def test_a_check_that_can_tell_nothing_does_not_count(rows: int) -> None:
    """A head that starts from 0, as in fine-tuning, and a batch without rows."""
    network = network_with(lambda logits: logits.softmax(1))
    if rows:
        nn.init.zeros_(network.head.weight)
        nn.init.zeros_(network.head.bias)
    select_batch(network, INPUTS[:rows], 0)
    nn.init.normal_(network.head.weight)
    with pytest.raises(ValueError, match=REFUSED):
        select_batch(network, INPUTS, 0)


def test_compiled_code_selects_without_a_check() -> None:
    network = network_with()
    chosen = torch.compile(lambda x: select_batch(network, x, 5), backend="eager")(INPUTS)
    assert torch.equal(chosen, select_batch(network_with(), INPUTS, 5))


def test_masked_classes_do_not_disturb() -> None:
    mask = torch.tensor([False, True, False, False])
    network = network_with(lambda logits: logits.masked_fill(mask, -torch.inf))
    chosen = select_batch(network, INPUTS, 5)
    assert torch.equal(chosen, expected_choice(predict(network, INPUTS), network.head.weight, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_training_that_diverged_is_not_called_another_head(value: float) -> None:
    network = network_with()
    next(network.body.parameters()).data.fill_(value)
    assert len(select_batch(network, INPUTS, 3)) == 3
    some = network_with(lambda logits: 2 * logits)
    with pytest.raises(ValueError, match=REFUSED):
        select_batch(some, torch.cat((INPUTS, torch.full((1, 6), value))), 3)


def test_the_memory_of_checks_keeps_nothing_alive() -> None:
    network = network_with()
    select_batch(network, INPUTS, 5)
    assert network in heads._passed
    alive, head = weakref.ref(network), weakref.ref(network.head)
    del network
    gc.collect()
    assert alive() is None and head() is None
