"""A plain loop with DistributedDataParallel, and a loader of torch or of torchdata."""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from marginops.training import Indexed, TrainingProgress

from .run import EPOCHS, Run, make_data, make_network, make_optimizer, make_sampler


def train(run: Run) -> None:
    """``loop`` has the loader of torch, ``loop:2`` a StatefulDataLoader with two workers."""
    workers = run.host.partition(":")[2]
    progress = TrainingProgress(make_sampler(run.group))
    dataset, options = Indexed(make_data()), {"batch_size": run.batch_size}
    if workers:
        options["num_workers"] = int(workers)
    if workers == "2":
        options["multiprocessing_context"] = "fork"  # its workers see that the rank was killed
    kind = StatefulDataLoader if workers else DataLoader
    loader = kind(dataset, sampler=progress.sampler, **options)
    network = make_network()
    optimizer = make_optimizer(network)
    if run.resume is not None:
        state = torch.load(run.resume[0] / "state.pt", weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        progress.load_state_dict(state["progress"])
    model = DistributedDataParallel(network) if run.ranks > 1 else network
    for epoch in range(progress.next_epoch, EPOCHS):
        progress.begin_epoch(epoch)
        for inputs, target, indices in loader:
            run.note(indices)
            loss = progress.update(indices, model(inputs), target).mean_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if run.step == run.save_at:
                _save(run, progress, network, optimizer)


def _save(
    run: Run,
    progress: TrainingProgress,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {"progress": progress.state_dict(), "network": network.state_dict()}
    if run.rank == 0:
        path = run.folder / "state.pt"
        torch.save({**state, "optimizer": optimizer.state_dict()}, f"{path}.part")
        os.replace(f"{path}.part", path)
    if run.ranks > 1:
        dist.barrier()
