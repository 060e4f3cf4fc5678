"""ProgressAlgorithm by the documented protocol of Composer.

Composer 0.32 needs an older torch than this package, so it does not install beside it.
The loop below fires the events of ``composer/trainer/trainer.py`` of version 0.32.1 in its order.
It calls algorithms as ``Engine._run_algorithms`` and ``State.state_dict`` do.
"""

import enum
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from helpers.dynamics_batches import assert_same_dynamics
from marginops.integrations.composer import ProgressAlgorithm
from marginops.training import Indexed, MarginSampler, TrainingDynamics, TrainingProgress

SAMPLES, VISITED, BATCH, EPOCHS = 40, 20, 5, 4


class Event(enum.Enum):
    """Some events of Composer, with their values."""

    FIT_START = "fit_start"
    EPOCH_START = "epoch_start"
    BATCH_START = "batch_start"
    AFTER_FORWARD = "after_forward"
    AFTER_LOSS = "after_loss"
    BATCH_END = "batch_end"
    EVAL_AFTER_FORWARD = "eval_after_forward"


class Trainer:
    """The loop of ``Trainer.fit``, with one algorithm and two microbatches a batch."""

    def __init__(self, algorithm: Any, loader: Any, network: Any, spin: bool = False) -> None:
        self.algorithm, self.loader, self.network, self.spin = algorithm, loader, network, spin
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
        self.state = SimpleNamespace(timestamp=SimpleNamespace(epoch=0, batch_in_epoch=0))
        self.visited: list[list[int]] = []
        assert not (algorithm.find_unused_parameters or algorithm.backwards_create_graph)

    def fire(self, event: Event) -> None:
        if self.algorithm.match(event, self.state):
            assert self.algorithm.apply(event, self.state, None) is None

    def fit(self, batches: int = 10**6) -> "Trainer":
        time, sampler = self.state.timestamp, self.loader.sampler
        assert isinstance(sampler, DistributedSampler)
        self.fire(Event.FIT_START)
        for epoch in range(time.epoch if self.spin else 0):
            sampler.set_epoch(epoch)
            next(iter(self.loader))
        while time.epoch < EPOCHS:
            if time.batch_in_epoch == 0:
                self.fire(Event.EPOCH_START)
            sampler.set_epoch(time.epoch)
            for batch in self.loader:
                self.fire(Event.BATCH_START)
                self.visited.append(batch[2].tolist())
                for rows in (slice(0, 3), slice(3, None)):
                    self.state.batch = [part[rows] for part in batch]
                    self.state.outputs = self.network(self.state.batch[0])
                    self.fire(Event.AFTER_FORWARD)
                    loss = functional.cross_entropy(self.state.outputs, self.state.batch[1])
                    self.fire(Event.AFTER_LOSS)
                    loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                time.batch_in_epoch += 1
                self.fire(Event.BATCH_END)
                self.fire(Event.EVAL_AFTER_FORWARD)
                if len(self.visited) == batches:
                    return self
            time.epoch, time.batch_in_epoch = time.epoch + 1, 0
        return self


def make(spin: bool = False) -> Trainer:
    torch.manual_seed(3)
    inputs = torch.randn(SAMPLES, 6)
    dataset = Indexed(TensorDataset(inputs, inputs[:, :4].argmax(1)))
    sampler = MarginSampler(TrainingDynamics(SAMPLES), num_samples=VISITED, seed=1)
    loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler)
    return Trainer(
        ProgressAlgorithm(TrainingProgress(sampler)), loader, torch.nn.Linear(6, 4), spin
    )


def resume(first: Trainer, spin: bool = False) -> Trainer:
    """What ``load_path`` does: everything goes through a file."""
    file, parts = io.BytesIO(), ("algorithm", "network", "optimizer")
    torch.save({name: getattr(first, name).state_dict() for name in parts}, file)
    file.seek(0)
    resumed, state = make(spin), torch.load(file, weights_only=True)
    for name in parts:
        getattr(resumed, name).load_state_dict(state[name])
    resumed.state.timestamp = first.state.timestamp
    return resumed


def test_every_sample_is_noted_once_a_visit() -> None:
    trainer = make().fit()
    assert len(trainer.visited) == EPOCHS * VISITED // BATCH
    dynamics = trainer.algorithm.progress.dynamics
    visits = torch.tensor(trainer.visited).flatten().bincount(minlength=SAMPLES)
    assert torch.equal(dynamics.count, visits.int())
    assert dynamics.count.min() > 0 and trainer.algorithm.progress.next_epoch == EPOCHS


@pytest.mark.parametrize("batches", [1, 4, 6, 15])
def test_a_state_goes_on_with_the_next_sample(batches: int) -> None:
    whole, first = make().fit(), make().fit(batches)
    resumed = resume(first).fit()
    assert first.visited + resumed.visited == whole.visited
    assert_same_dynamics(resumed.algorithm.progress.dynamics, whole.algorithm.progress.dynamics)


def test_dataloaders_that_spin_are_an_error() -> None:
    first = make().fit(6)
    with pytest.raises(ValueError, match="dynamics: expected the weights of epoch"):
        resume(first, spin=True).fit()


def test_batches_of_another_form() -> None:
    trainer = make()
    batch_of = lambda batch, outputs: (batch["index"], outputs["logits"], batch["labels"])  # noqa: E731
    algorithm = ProgressAlgorithm(trainer.algorithm.progress, batch_of)
    batch = {"index": torch.tensor([3, 4]), "labels": torch.tensor([0, 1])}
    state = SimpleNamespace(batch=batch, outputs={"logits": torch.zeros(2, 4)})
    algorithm.apply(Event.AFTER_FORWARD, state, None)
    assert algorithm.progress.dynamics.count.nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "progress: expected TrainingProgress, got int"),
        ((TrainingProgress(dynamics=TrainingDynamics(2)), 3), "batch_of: expected a function, got"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ProgressAlgorithm(*arguments)
