"""Batch selection, the training loop and the data sets."""

import doctest
from collections import UserDict
from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune

from marginops import minimal_margin_score
from marginops.commands import data
from marginops.commands.data import ClassificationData, load_digits
from marginops.commands.demo import loop
from marginops.commands.demo.loop import train
from marginops.networks import evaluation_mode, last_linear, predict
from marginops.training import select_batch, selection

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def network_with_state(device: str = "cpu") -> nn.Sequential:
    """Batch norm and dropout: in training mode it would change itself and draw random numbers."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4)
    )
    return network.to(device)


def expected_choice(logits: Tensor, weight: Tensor, k: int) -> Tensor:
    """The definition, sample by sample."""
    scores = []
    for row in logits.double():
        first, second = row.sort(descending=True, stable=True).indices[:2]
        distance = (weight[first] - weight[second]).double().norm()
        scores.append((row[first] - row[second]) / distance)
    return torch.stack(scores).sort(stable=True).indices[:k]


def synthetic_data(samples: int = 50) -> ClassificationData:
    """Inputs whose first feature is the sample's number, so that a network can tell who came."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 6, generator=generator)
    inputs[:, 0] = torch.arange(samples)
    target = torch.arange(samples) % 4
    return ClassificationData("synthetic", 4, inputs, target, inputs[:20], target[:20])


class Recorder(nn.Module):
    """Notes the mode, the sample numbers and the logits of every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 4)
        self.calls: list[tuple[bool, list[int], Tensor, Tensor]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.head(inputs / 10)
        weight = self.head.weight.detach().clone()
        self.calls.append((self.training, inputs[:, 0].int().tolist(), logits.detach(), weight))
        return logits


class Pair(nn.Module):
    """Two inputs, as a text network has, and an output that carries its logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 4)

    def forward(self, left: Tensor, right: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(left * right))


@pytest.mark.parametrize("device", DEVICES)
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


@pytest.mark.parametrize("device", DEVICES)
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


def test_evaluation_mode_of_a_network_already_evaluating() -> None:
    network = network_with_state().eval()
    with evaluation_mode(network):
        assert not network.training
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("form", [tuple, list, dict, UserDict])
def test_select_batch_takes_structured_inputs(form: type) -> None:
    network = Pair()
    left, right = torch.randn(2, 30, 6)
    by_name = issubclass(form, (dict, UserDict))
    inputs = form({"right": right, "left": left}) if by_name else form((left, right))
    expected = expected_choice(network(left, right).logits, network.head.weight, 4)
    assert torch.equal(select_batch(network, inputs, 4), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_chosen_candidates_can_be_trained_on_under_autocast(device: str) -> None:
    network = network_with_state(device)
    inputs = torch.randn(40, 6, device=device, requires_grad=True)
    with torch.autocast(device, dtype=torch.bfloat16):
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


def test_head_is_found_by_its_width() -> None:
    network = network_with_state()
    network.append(nn.Identity())
    assert last_linear(network, 4) is network[4]
    network.add_module("again", network[4])
    assert last_linear(network, 4) is network[4], "one layer under two names is one layer"


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
        lambda network: setattr(network[-1], "forward", lambda x: x[:, :4].sin()),
        lambda network: network[-1].register_forward_hook(lambda _, args, output: -output),
        lambda network: network.register_forward_hook(lambda _, args, output: -output),
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


def test_errors_name_what_to_pass() -> None:
    inputs = torch.randn(40, 6)
    twins = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.Identity())
    with pytest.raises(ValueError, match=r"several .* 4 outputs \(0, 2\); pass head="):
        select_batch(twins, inputs, 5)
    chosen = select_batch(twins, inputs, 5, head=twins[2])
    assert torch.equal(chosen, expected_choice(twins(inputs), twins[2].weight, 5))
    with pytest.raises(ValueError, match=r"no linear .* 6 outputs \(.*none\); pass head="):
        select_batch(nn.Sequential(nn.ReLU()), inputs, 5)
    with pytest.raises(ValueError, match=r"no linear .* 3 outputs \(linear layers: 0: 4\)"):
        select_batch(nn.Sequential(nn.Linear(6, 4), nn.AdaptiveAvgPool1d(3)), inputs, 5)
    with pytest.raises(TypeError, match=r"head: expected a torch.nn.Linear, got Sequential"):
        select_batch(twins, inputs, 5, head=twins)
    with pytest.raises(ValueError, match=r"k: expected 0 <= k <= 40"):
        select_batch(network_with_state(), inputs, 41)
    with pytest.raises(ValueError, match=r"network: .* shape \[B, C\], got \[2, 20, 4\]"):
        select_batch(network_with_state()[-1:], torch.randn(2, 20, 12), 1)
    lstm = nn.LSTM(6, 4)
    with pytest.raises(TypeError, match=r"network: expected logits .* got tuple"):
        select_batch(lstm, inputs, 1)


def train_recorder(sampling: str, **options) -> tuple[Recorder, loop.TrainingHistory]:
    network = Recorder()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    settings = {"updates": 9, "batch_size": 3, "candidate_ratio": 5, "evaluate_every": 4}
    settings |= {"generator": torch.Generator().manual_seed(1)} | options
    return network, train(network, synthetic_data(), optimizer, sampling=sampling, **settings)


def test_selection_scores_in_evaluation_mode_and_trains_on_the_chosen() -> None:
    network, history = train_recorder("minimal_margin", evaluate_every=100)
    # Margins and accuracy before, then a pair of passes for each update, then the same after.
    pairs = list(zip(network.calls[2:-2:2], network.calls[3:-2:2], strict=True))
    assert len(pairs) == 9
    for (scoring, candidates, logits, weight), (training, batch, _, _) in pairs:
        assert (scoring, training) == (False, True)
        chosen = expected_choice(logits, weight, 3)
        assert batch == [candidates[row] for row in chosen]
    # 50 samples give three draws of 15; then the next epoch begins.
    draws = [candidates for (_, candidates, _, _), _ in pairs]
    for epoch in range(3):
        drawn = [*chain(*draws[3 * epoch : 3 * epoch + 3])]
        assert len(set(drawn)) == len(drawn) == 45
    assert draws[0] != draws[3]
    assert (history.samples_trained, history.samples_scored) == (27, 135)


def test_uniform_sampling_takes_as_many_updates_and_scores_nothing() -> None:
    network, history = train_recorder("uniform", updates=32, evaluate_every=100)
    batches = [batch for training, batch, _, _ in network.calls if training]
    assert len(network.calls) == 32 + 4
    assert [len(batch) for batch in batches] == [3] * 32
    assert len(set(chain(*batches[:16]))) == len(set(chain(*batches[16:]))) == 48
    assert (history.samples_trained, history.samples_scored) == (96, 0)


def test_history_and_callback_count_updates() -> None:
    seen: list[int] = []
    network, history = train_recorder("minimal_margin", on_update=seen.append)
    assert seen == list(range(1, 10))
    assert history.updates == (0, 4, 8, 9)
    assert history.seconds[0] == 0
    assert list(history.seconds) == sorted(history.seconds)
    assert history.seconds[-1] > 0
    data = synthetic_data()
    accuracy = (network(data.test_inputs).argmax(1) == data.test_target).double().mean()
    assert history.test_accuracy[-1] == accuracy.item()
    for margins, model in ((history.margins_before, Recorder()), (history.margins_after, network)):
        logits = model(data.train_inputs).detach()
        label = logits.gather(1, data.train_target[:, None])[:, 0]
        rival = logits.scatter(1, data.train_target[:, None], -torch.inf).max(1).values
        torch.testing.assert_close(margins, label - rival)


def test_margins_are_normalised_on_request() -> None:
    def log_norm(network: nn.Module) -> Tensor:
        return network.head.weight.norm().log()

    network, history = train_recorder("uniform", log_norm=log_norm)
    _, plain = train_recorder("uniform")
    norm = network.head.weight.norm().detach()
    torch.testing.assert_close(history.margins_after * norm, plain.margins_after)


def test_schedule_counts_updates() -> None:
    network = Recorder()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    train(
        network, synthetic_data(), optimizer, updates=6, batch_size=3, scheduler=scheduler,
        candidate_ratio=2,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.5**6


@pytest.mark.parametrize("sampling", ["uniform", "minimal_margin"])
def test_training_repeats_itself(sampling: str) -> None:
    first, again = (train_recorder(sampling)[1] for _ in range(2))
    other = train_recorder(sampling, generator=torch.Generator().manual_seed(2))[1]
    assert torch.equal(first.margins_after, again.margins_after)
    assert first.test_accuracy == again.test_accuracy
    assert not torch.equal(first.margins_after, other.margins_after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": 0}, "updates: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"candidate_ratio": -1}, "candidate_ratio: expected at least 1, got -1"),
        ({"evaluate_every": 0}, "evaluate_every: expected at least 1, got 0"),
        ({"batch_size": 11}, "batch_size: each update would draw 55 of 50 training samples"),
    ],
)
def test_training_checks_its_numbers(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_recorder("minimal_margin", **options)


def test_training_checks_the_sampling() -> None:
    with pytest.raises(ValueError, match='expected "uniform" or "minimal_margin", got \'mms\''):
        train_recorder("mms")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sampling", ["uniform", "minimal_margin"])
def test_digits_are_learnt(device: str, sampling: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    network.to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    history = train(
        network,
        load_digits().to(device),
        optimizer,
        updates=200,
        batch_size=16,
        sampling=sampling,
        generator=torch.Generator().manual_seed(0),
    )
    assert history.test_accuracy[0] < 0.3
    assert history.test_accuracy[-1] > 0.9
    assert history.margins_after.device.type == "cpu"
    assert history.margins_after.median() > history.margins_before.median() + 1


@pytest.mark.parametrize("module", [selection, loop, data], ids=lambda module: module.__name__)
def test_examples_run(module) -> None:
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
