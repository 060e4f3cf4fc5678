"""Batch selection: which candidates it chooses, from which networks and inputs."""

from collections import UserDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from helpers.classifiers import Pair, expected_choice, network_with_state
from marginops import minimal_margin_score
from marginops.networks import predict
from marginops.training import select_batch


@pytest.mark.parametrize("k", [0, 1, 7, 40])
def test_select_batch_follows_the_definition(device: str, k: int) -> None:
    network = network_with_state(device)
    inputs = torch.randn(40, 6, device=device)
    chosen = select_batch(network, inputs, k)
    expected = expected_choice(predict(network, inputs), network[-1].weight, k)
    assert torch.equal(chosen, expected)
    assert chosen.dtype == torch.int64
    assert not chosen.requires_grad


def test_select_batch_passes_its_options_on() -> None:
    network = network_with_state()
    network[-1].bias.data *= 5
    inputs = torch.randn(200, 6)
    logits, head = predict(network, inputs), network[-1]
    choices = []
    for options in ({}, {"rival": "nearest"}, {"bias_in_norm": True}):
        scores = minimal_margin_score(logits, head.weight, head.bias, **options)
        choices.append(select_batch(network, inputs, 200, **options).tolist())
        assert choices[-1] == scores.sort(stable=True).indices.tolist()
    assert choices[1] != choices[0] != choices[2], "the options make no difference on this input"


def test_select_batch_changes_nothing(device: str) -> None:
    network = network_with_state(device)
    network[1].eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    random_state = torch.get_rng_state()
    inputs = torch.randn(40, 6, device=device, generator=torch.Generator(device).manual_seed(1))
    first = select_batch(network, inputs, 5)
    assert torch.equal(first, select_batch(network, inputs, 5)), "dropout was active"
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_modes_are_restored_after_an_error() -> None:
    network = network_with_state()
    network[3].eval()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        select_batch(network, torch.randn(40, 5), 5)
    assert [module.training for module in network] == [True, True, True, False, True]


@pytest.mark.parametrize("form", [tuple, list, dict, UserDict])
def test_select_batch_takes_structured_inputs(form: type) -> None:
    network = Pair()
    left, right = torch.randn(2, 30, 6)
    by_name = issubclass(form, (dict, UserDict))
    inputs = form({"right": right, "left": left}) if by_name else form((left, right))
    expected = expected_choice(network(left, right).logits, network.head.weight, 4)
    assert torch.equal(select_batch(network, inputs, 4), expected)


def test_chosen_candidates_can_be_trained_on_under_autocast(device: str) -> None:
    network = network_with_state(device)
    inputs = torch.randn(40, 6, device=device, requires_grad=True)
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        chosen = select_batch(network, inputs, 8)
        loss = F.cross_entropy(network(inputs[chosen]), chosen % 4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert network[-1].weight.grad.abs().sum() > 0
    assert inputs.grad is not None
    assert inputs.grad.abs().sum(1).nonzero().flatten().tolist() == sorted(chosen.tolist())


def test_select_batch_reads_no_tensor_value() -> None:
    with FakeTensorMode():
        network = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 4))
        assert select_batch(network, torch.randn(40, 6), 5).shape == (5,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_select_batch_does_not_wait_for_the_gpu() -> None:
    network = network_with_state("cuda")
    inputs = torch.randn(40, 6, device="cuda")
    select_batch(network, inputs, 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        select_batch(network, inputs, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_fused_head_chooses_as_the_logits_do() -> None:
    class Whole(nn.Sequential):
        """Might do more than its modules, so that it is run as a whole."""

    network, inputs = network_with_state(), torch.randn(40, 6)
    whole = Whole(*network)
    with torch.no_grad():
        logits = network.eval()(inputs)
    expected = expected_choice(logits, network[-1].weight, 7)
    assert torch.equal(select_batch(network, inputs, 7), expected)
    assert torch.equal(select_batch(network, inputs, 7, head=network[-1]), expected)
    assert torch.equal(select_batch(whole, inputs, 7), expected)


def make_sparse(network: nn.Sequential) -> None:
    """Pruning computes the weight anew in a hook, so the one from before the step is stale."""
    prune.l1_unstructured(network[-1], "weight", amount=0.5)
    with torch.no_grad():
        network[-1].weight_orig.neg_().mul_(torch.rand(4, 12))


@pytest.mark.parametrize(
    "change",
    [
        make_sparse,
        lambda network: setattr(network[-1], "forward", network[-1].forward),
        lambda network: network[-1].register_forward_hook(lambda _, args, output: output + 1),
        lambda network: network.register_forward_hook(
            lambda _, args, output: output.log_softmax(1)
        ),
        lambda network: network.register_forward_pre_hook(lambda _, args: (-args[0],)),
    ],
)
def test_a_network_that_does_more_is_run(change: Callable[[nn.Sequential], object]) -> None:
    network, inputs = network_with_state(), torch.randn(40, 6)
    change(network)
    chosen = select_batch(network, inputs, 7)
    with torch.no_grad():
        logits = network.eval()(inputs)
    assert torch.equal(chosen, expected_choice(logits, network[-1].weight, 7))


def test_a_head_that_is_passed_is_the_one_used() -> None:
    inputs = torch.randn(40, 6)
    twins = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.Identity())
    with pytest.raises(ValueError, match=r"several .* 4 outputs \(0, 2\); pass head="):
        select_batch(twins, inputs, 5)
    chosen = select_batch(twins, inputs, 5, head=twins[2])
    assert torch.equal(chosen, expected_choice(twins(inputs), twins[2].weight, 5))


@pytest.mark.parametrize(
    ("network", "shape", "options", "error", "message"),
    [
        (nn.Linear(6, 4), (40, 6), {"head": nn.Sequential()}, TypeError, "head: .* got Sequential"),
        (nn.Linear(6, 4), (40, 6), {"k": 41}, ValueError, "k: expected 0 <= k <= 40"),
        (nn.Linear(6, 4), (2, 20, 6), {}, ValueError, r"network: .* \[B, C\], got \[2, 20, 4\]"),
        (nn.LSTM(6, 4), (40, 6), {}, TypeError, "network: expected logits .* got tuple"),
        (nn.ReLU(), (40, 6), {}, ValueError, "no linear layer has 6 outputs .* pass head="),
    ],
)
def test_errors_name_what_is_wrong(network, shape, options, error, message) -> None:
    with pytest.raises(error, match=message):
        select_batch(network, torch.randn(shape), **{"k": 1, **options})
