"""The training loop of the demo: what it draws, trains on, scores and records."""

import time
from itertools import chain

import pytest
import torch
from torch import Tensor, nn

from helpers.classifiers import expected_choice
from marginops.commands.data import ClassificationData, load_digits
from marginops.commands.demo import loop
from marginops.commands.demo.loop import TrainingHistory, train
from marginops.training import TrainingDynamics


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


def train_recorder(sampling: str, **options) -> tuple[Recorder, TrainingHistory]:
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


def test_stale_margins_decide_who_is_visited_next() -> None:
    dynamics = TrainingDynamics(50)
    network, history = train_recorder(
        "stale_margin", updates=60, evaluate_every=100, dynamics=dynamics
    )
    passes = [call for call in network.calls if call[0]]
    # Nothing is scored: there is one pass for each update, and two before and two after.
    assert len(network.calls) == 60 + 4
    assert (history.samples_trained, history.samples_scored) == (180, 0)
    assert all(len(batch) == 3 for _, batch, _, _ in passes)
    # Of the 20 visits of an epoch 18 fill batches: everybody is seen in the first four epochs.
    epochs = [[*chain(*(call[1] for call in passes[at : at + 6]))] for at in range(0, 60, 6)]
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert set(chain(*epochs[:4])) == set(range(50))
    margin = torch.full((50,), torch.nan)
    target = synthetic_data().train_target
    chosen = [set[int]()]
    for at, (_, batch, logits, _) in enumerate(passes):
        if at % 6 == 0:
            # Sixteen of the twenty visits are the smallest margins, as last seen.
            chosen.append(set(margin.argsort()[:16].tolist()))
        label = target[batch]
        rival = logits.scatter(1, label[:, None], -torch.inf).max(1).values
        margin[batch] = logits.gather(1, label[:, None])[:, 0] - rival
    for epoch, smallest in list(zip(epochs, chosen[1:], strict=True))[4:9]:
        # Two of the twenty visits did not fill a batch.
        assert len(smallest & set(epoch)) >= 14
    torch.testing.assert_close(dynamics.margin, margin)
    # The last tenth of the epochs draws from all samples.
    assert len(chosen[10] & set(epochs[9])) < 14


@pytest.mark.parametrize(("share", "left_out"), [(0.3, 15), (0.9, 30)])
def test_what_looks_mislabelled_is_left_out(
    share: float, left_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "mislabelled_share", lambda _: share)
    dynamics = TrainingDynamics(50)
    averages: list[Tensor] = []

    def keep(update: int) -> None:
        if update % 6 == 0:
            averages.append(dynamics.margin_average)

    network, _ = train_recorder(
        "stale_margin",
        updates=60,
        evaluate_every=100,
        dynamics=dynamics,
        skip_mislabelled=True,
        on_update=keep,
    )
    batches = [batch for training, batch, _, _ in network.calls if training]
    for epoch in range(4, 9):
        visited = set(chain(*batches[6 * epoch : 6 * epoch + 6]))
        assert not visited & set(averages[epoch - 1].argsort()[:left_out].tolist())


def test_uniform_runs_can_collect_dynamics() -> None:
    dynamics = TrainingDynamics(50)
    _, collected = train_recorder("uniform", updates=20, dynamics=dynamics)
    _, plain = train_recorder("uniform", updates=20)
    torch.testing.assert_close(collected.margins_after, plain.margins_after)
    assert dynamics.count.sum() == 60


def test_runs_with_selection_can_collect_dynamics() -> None:
    dynamics = TrainingDynamics(50)
    network, _ = train_recorder("minimal_margin", evaluate_every=100, dynamics=dynamics)
    trained = [*chain(*(batch for training, batch, _, _ in network.calls if training))]
    assert dynamics.count.tolist() == [trained.count(sample) for sample in range(50)]


def test_time_is_that_of_this_process() -> None:
    def wait(_: int) -> None:
        time.sleep(0.05)

    _, history = train_recorder("uniform", on_update=wait)
    assert history.seconds[-1] < 0.4


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


@pytest.mark.parametrize("sampling", ["uniform", "minimal_margin", "stale_margin"])
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
        (
            {"batch_size": 11},
            "batch_size: expected at most 50 draws per update, .* got 55; lower batch_size",
        ),
    ],
)
def test_training_checks_its_numbers(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_recorder("minimal_margin", **options)


def test_a_batch_is_not_larger_than_an_epoch_of_stale_margins() -> None:
    message = "batch_size: expected at most 20, the number of samples that an epoch visits, got 21"
    with pytest.raises(ValueError, match=message):
        train_recorder("stale_margin", batch_size=21)
    _, history = train_recorder("stale_margin", batch_size=20)
    assert history.samples_trained == 180


def test_training_checks_the_sampling() -> None:
    with pytest.raises(ValueError, match=r"expected .uniform., .*, got 'mms'"):
        train_recorder("mms")


@pytest.mark.parametrize("sampling", ["uniform", "minimal_margin", "stale_margin"])
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
