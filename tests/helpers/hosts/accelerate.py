"""A loop with accelerate, which saves and loads everything itself."""

from accelerate import Accelerator
from torch.utils.data import DataLoader

from marginops.training import Indexed, TrainingProgress

from .run import EPOCHS, Run, make_data, make_network, make_optimizer, make_sampler


def train(run: Run) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == run.ranks
    progress = TrainingProgress(make_sampler())
    loader = DataLoader(Indexed(make_data()), run.batch_size, sampler=progress.sampler)
    network = make_network()
    network, optimizer, loader = accelerator.prepare(network, make_optimizer(network), loader)
    accelerator.register_for_checkpointing(progress)
    if run.resume is not None:
        accelerator.load_state(str(run.resume[0] / "state"))
    for epoch in range(progress.next_epoch, EPOCHS):
        progress.begin_epoch(epoch)
        loader.set_epoch(epoch)
        for inputs, target, indices in loader:
            run.note(indices)
            loss = progress.update(indices, network(inputs), target).mean_loss()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            if run.step == run.save_at:
                accelerator.save_state(str(run.folder / "state"))
                accelerator.wait_for_everyone()
