"""TrainingProgress under accelerate, by its protocol alone: ways to divide batches, wrong use."""

import ast
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from helpers.ranks import Ranks, ranks_fixture
from marginops.training import Indexed, MarginSampler, TrainingDynamics, TrainingProgress

SAMPLES, BATCH, EPOCHS = 48, 8, 4  # 8 samples a step on all ranks
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "even": {},
    "uneven": {"even_batches": False},
    "split": {"split_batches": True},
    "split uneven": {"split_batches": True, "even_batches": False},
    "dispatch": {"dispatch_batches": True},
    "dispatch split": {"dispatch_batches": True, "split_batches": True},
}


def make_progress(num_samples: int) -> TrainingProgress:
    return TrainingProgress(MarginSampler(TrainingDynamics(SAMPLES), num_samples=num_samples))


def train(
    num_samples: int,
    configuration: dict[str, Any],
    stop: int = 10**6,
    state: Any = None,
    names_epoch: bool = True,
    accumulate: int = 1,
) -> tuple[list[list[int]], dict[str, Any]]:
    """Train until a step; returns the ids of each step and the state."""
    AcceleratorState._reset_state(True)
    configured = DataLoaderConfiguration(**configuration)
    accelerator = Accelerator(
        cpu=True, dataloader_config=configured, gradient_accumulation_steps=accumulate
    )
    ranks = 1 if configured.split_batches else accelerator.num_processes
    torch.manual_seed(3)
    inputs = torch.randn(SAMPLES, 6)
    progress = make_progress(num_samples)
    dataset = Indexed(TensorDataset(inputs, inputs[:, :4].argmax(1)))
    loader = DataLoader(dataset, batch_size=BATCH // ranks, sampler=progress.sampler)
    network = torch.nn.Linear(6, 4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    visited: list[list[int]] = []
    if state is not None:
        progress.load_state_dict(state)
    for epoch in range(progress.next_epoch, EPOCHS):
        progress.begin_epoch(epoch)
        if names_epoch:
            loader.set_epoch(epoch)
        for inputs, target, indices in loader:
            with accelerator.accumulate(network):
                loss = progress.update(indices, network(inputs), target).mean_loss()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            visited.append(indices.tolist())
            if len(visited) == stop:
                return visited, progress.state_dict()
    return visited, progress.state_dict()


def train_on_rank(groups: Any, job: tuple[int, dict[str, Any]]) -> Any:
    rank, options = job
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29512}
    os.environ |= {name: str(value) for name, value in names.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(**options)


ranks = ranks_fixture(2)


def on_both(ranks: Ranks, **options: Any) -> list[Any]:
    return ranks.results(train_on_rank, [(rank, options) for rank in range(2)], timeout=120)


def joined(answers: list[Any]) -> list[list[int]]:
    longest = max(len(visited) for visited, _ in answers)
    return [
        sorted(id for visited, _ in answers for id in (visited[step : step + 1] or [[]])[0])
        for step in range(longest)
    ]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_two_ranks_visit_what_one_process_does(ranks: Ranks, name: str) -> None:
    options = {"num_samples": 24, "configuration": CONFIGURATIONS[name]}
    alone, final = train(24, {})
    answers = on_both(ranks, **options)
    assert joined(answers) == [sorted(ids) for ids in alone]
    first = on_both(ranks, **options, stop=4)
    state = first[1][1]
    assert (state["epoch"], state["position"]) == (1, 8)
    rest = on_both(ranks, **options, state=state)
    assert joined(rest) == [sorted(ids) for ids in alone[4:]]
    assert train(24, {}, state=state)[0] == alone[4:]  # 2 ranks, then 1 process
    assert torch.equal(rest[0][1]["dynamics"]["counts"], final["dynamics"]["counts"])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_epoch_that_the_batches_do_not_divide_is_whole(ranks: Ranks, name: str) -> None:
    """22 samples: the last step has 6, and even batches repeat samples of the epoch."""
    options = {"num_samples": 22, "configuration": CONFIGURATIONS[name]}
    alone, _ = train(22, {}, stop=3)
    answers = on_both(ranks, **options, stop=2)
    assert joined(answers) == [sorted(ids) for ids in alone[:2]]
    whole = joined(on_both(ranks, **options))[:3]
    assert {*whole[2]} >= {*alone[2]}
    assert {id for ids in whole for id in ids} == {id for ids in alone for id in ids}
    repeats = name in ("even", "split")  # 6 samples are as many on both ranks if one dispatches
    assert len(whole[2]) == (8 if repeats else 6)


def test_gradient_accumulation_counts_every_batch(ranks: Ranks) -> None:
    answers = on_both(ranks, num_samples=24, configuration={}, stop=5, accumulate=2)
    alone, _ = train(24, {}, stop=5)
    assert joined(answers) == [sorted(ids) for ids in alone]
    assert answers[0][1]["position"] == 16


def test_a_resumed_loop_that_does_not_name_its_epoch_is_an_error(ranks: Ranks) -> None:
    """A prepared loader counts its own iterations, from 0 on in every run."""
    _, state = train(24, {}, stop=4)
    with pytest.raises(ValueError, match=r"expected the sampler in epoch 1 .*loader.set_epoch"):
        train(24, {}, state=state, names_epoch=False)
    with pytest.raises(ValueError, match=r"expected the sampler in epoch 1 .*loader.set_epoch"):
        on_both(ranks, num_samples=24, configuration={}, state=state, names_epoch=False)


def test_the_example_adds_four_lines_to_a_loop_of_accelerate() -> None:
    """Added lines are statements that a loop without this package does not have at all."""
    path = Path(__file__).parents[2] / "examples" / "accelerate_two_processes.py"
    tree = ast.parse(path.read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    lines = [ast.unparse(node).splitlines()[0] for node in ast.walk(function)
             if isinstance(node, (ast.Assign, ast.Expr, ast.For))]  # fmt: skip
    own = [line for line in lines if "progress" in line or "set_epoch" in line]
    replaced = ("loader = DataLoader(", "for epoch in range(", "loss = ", "where = ")
    added = [line for line in own if not line.startswith(replaced)]
    assert len(own) == 8
    assert sorted(line.partition("(")[0] for line in added) == [
        "accelerator.register_for_checkpointing",
        "loader.set_epoch",
        "progress = TrainingProgress",
        "progress.begin_epoch",
    ]
