"""ProgressHandler in real engines of PyTorch-Ignite: epochs, records, checkpoints, wrong use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver
from torch.utils.data import DataLoader, TensorDataset

from helpers.dynamics_batches import assert_same_dynamics
from marginops.integrations.ignite import ProgressHandler
from marginops.training import Indexed, MarginSampler, TrainingDynamics, TrainingProgress

SAMPLES, VISITED, BATCH, EPOCHS = 40, 20, 5, 4


class Training:
    """An engine that notes the ids of its steps."""

    def __init__(self, own_loss: bool = True) -> None:
        torch.manual_seed(3)
        inputs = torch.randn(SAMPLES, 6)
        dataset = Indexed(TensorDataset(inputs, inputs[:, :4].argmax(1)))
        self.network = torch.nn.Linear(6, 4)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.2)
        sampler = MarginSampler(TrainingDynamics(SAMPLES), num_samples=VISITED, seed=1)
        self.progress = TrainingProgress(sampler)
        self.loader = DataLoader(dataset, batch_size=BATCH, sampler=sampler)
        self.visited: list[list[int]] = []
        self.own_loss = own_loss
        self.engine = Engine(self.step)
        ProgressHandler(self.progress, batch_of=None if own_loss else lambda output: output).attach(
            self.engine
        )

    def step(self, engine: Engine, batch: Any) -> Any:
        inputs, target, indices = batch
        self.visited.append(indices.tolist())
        logits = self.network(inputs)
        if self.own_loss:
            loss = self.progress.update(indices, logits, target).mean_loss()
        else:
            loss = torch.nn.functional.cross_entropy(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return indices, logits, target

    @property
    def parts(self) -> dict[str, Any]:
        names = "engine", "progress", "network", "optimizer"
        return {name: getattr(self, name) for name in names}

    def run(self, **options: Any) -> "Training":
        self.engine.run(self.loader, **options)
        return self


def plain_loop() -> Training:
    training = Training()
    for epoch in range(EPOCHS):
        training.progress.begin_epoch(epoch)
        for batch in training.loader:
            training.step(None, batch)
    return training


@pytest.mark.parametrize("own_loss", [True, False])
def test_an_engine_visits_what_a_loop_does(own_loss: bool) -> None:
    expected = plain_loop()
    training = Training(own_loss).run(max_epochs=EPOCHS)
    assert training.visited == expected.visited and len(expected.visited) == 16
    assert int(training.progress.dynamics.count.sum()) == VISITED * EPOCHS
    if own_loss:  # else the loss of torch rounds in its own way
        assert_same_dynamics(training.progress.dynamics, expected.progress.dynamics)


class Killed(Exception):
    """Ends an engine in the middle of an epoch."""


@pytest.mark.parametrize("step", [1, 6, 8, 15])
def test_a_checkpoint_of_ignite_goes_on_with_the_next_sample(step: int, tmp_path: Path) -> None:
    expected = plain_loop()
    first = Training()
    saver = Checkpoint(first.parts, DiskSaver(str(tmp_path)), n_saved=None)
    first.engine.add_event_handler(Events.ITERATION_COMPLETED(once=step), saver)

    @first.engine.on(Events.ITERATION_STARTED(once=step + 1))
    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        first.run(max_epochs=EPOCHS)
    resumed = Training()
    state = torch.load(next(tmp_path.iterdir()), weights_only=True)
    Checkpoint.load_objects(resumed.parts, state)
    resumed.run(max_epochs=EPOCHS)
    assert resumed.visited == expected.visited[step:]
    assert_same_dynamics(resumed.progress.dynamics, expected.progress.dynamics)


def test_an_engine_that_asks_for_more_than_an_epoch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"epoch_length: expected no more batches .*, got 3 to go"):
        Training().run(max_epochs=1, epoch_length=7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "progress: expected TrainingProgress, got int"),
        ((TrainingProgress(dynamics=TrainingDynamics(2)), 3), "batch_of: expected a function, got"),
    ],
)
def test_wrong_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ProgressHandler(*arguments)
