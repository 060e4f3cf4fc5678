"""What the hosts share: data, network, and a run that notes its samples and may be killed."""

import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import signal
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from marginops.training import MarginSampler, TrainingDynamics

SAMPLES, VISITED, BATCH, EPOCHS = 48, 24, 8, 5  # 3 steps an epoch, with 8 samples on all ranks
STEPS = EPOCHS * VISITED // BATCH
PATIENCE = 180  # seconds for a training; only one that hangs takes so long


@dataclasses.dataclass
class Run:
    """One start of a training.

    Attributes:
        host: The name of the file in this folder, and what it is told after a colon.
        ranks: The number of processes.
        folder: Where this run writes its checkpoint and its notes.
        resume: The folder of the run whose checkpoint it goes on from, and that checkpoint's step.
        save_at: The step after which it saves a checkpoint.
        die_at: The step in which it is killed.
    """

    host: str
    ranks: int
    folder: Path
    resume: tuple[Path, int] | None = None
    save_at: int | None = None
    die_at: int | None = None
    rank: int = 0

    def __post_init__(self) -> None:
        self.step = 0 if self.resume is None else self.resume[1]

    @property
    def batch_size(self) -> int:
        """The number of samples in a batch of one rank."""
        return BATCH // self.ranks

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.ranks > 1 else None

    def note(self, ids: torch.Tensor) -> None:
        """Note the ids of the batch on which a step begins to train, and die if it is time."""
        self.step += 1
        with open(self.folder / f"ids-{self.rank}.jsonl", "a") as file:
            file.write(json.dumps([self.step, ids.tolist()]) + "\n")
        if self.step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self) -> dict[int, list[int]]:
        """Run it in processes of its own; returns the ids of all ranks at each step."""
        self.folder.mkdir()
        context = multiprocessing.get_context("forkserver")
        runs = [dataclasses.replace(self, rank=rank) for rank in range(self.ranks)]
        processes = [context.Process(target=_serve, args=(run,)) for run in runs]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        late = [process for process in processes if process.is_alive()]
        for process in late:
            process.kill()
        errors = [path.read_text() for path in self.folder.glob("error-*")]
        expected = 0 if self.die_at is None else -signal.SIGKILL
        if late or {process.exitcode for process in processes} != {expected}:
            codes = [process.exitcode for process in processes]
            pytest.fail(f"{self.host}: exit codes {codes}, {len(late)} late\n" + "\n".join(errors))
        steps: dict[int, list[int]] = {}
        for rank in range(self.ranks):
            for line in (self.folder / f"ids-{rank}.jsonl").read_text().splitlines():
                step, ids = json.loads(line)
                steps.setdefault(step, []).extend(ids)
        return {step: sorted(ids) for step, ids in steps.items()}


def _serve(run: Run) -> None:
    """Train as one rank of a run."""
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")  # the hosts give advice
        if run.ranks > 1:
            _join(run)
        importlib.import_module(f"helpers.hosts.{run.host.partition(':')[0]}").train(run)
        if run.ranks > 1:
            dist.barrier()
    except BaseException:
        (run.folder / f"error-{run.rank}").write_text(traceback.format_exc())
        raise


def _join(run: Run) -> None:
    """Join the ranks of the run, and tell the hosts of it as torchrun does."""
    variables = {"RANK": run.rank, "LOCAL_RANK": run.rank, "WORLD_SIZE": run.ranks}
    variables |= {"LOCAL_WORLD_SIZE": run.ranks, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "run"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29511}
    os.environ |= {name: str(value) for name, value in variables.items()}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{run.folder / 'store'}",
        rank=run.rank,
        world_size=run.ranks,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 6, generator=generator)
    return TensorDataset(inputs, (inputs[:, :4].argmax(1) + (inputs[:, 4] > 1)) % 4)


def make_network() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def make_optimizer(network: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=0.2)


def make_sampler(group: dist.ProcessGroup | None = None) -> MarginSampler:
    return MarginSampler(TrainingDynamics(SAMPLES), num_samples=VISITED, seed=3, group=group)
