"""Trains on the samples with the smallest margins under accelerate, stops, and resumes.

    python examples/accelerate_two_processes.py
    torchrun --nproc_per_node 2 examples/accelerate_two_processes.py

The first command takes a few seconds on one CPU. The state that the second training loads was saved
in the middle of an epoch. It would do the same with another number of processes.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from marginops.training import Indexed, MarginSampler, TrainingDynamics, TrainingProgress

images, classes = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16).float(), torch.tensor(classes))
data, test = torch.utils.data.random_split(data, [1347, 450], torch.Generator().manual_seed(0))


def train(folder: str, resume: bool, epochs: int = 15, steps: int = 10**6) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    progress = TrainingProgress(MarginSampler(TrainingDynamics(num_samples=len(data))))
    loader = DataLoader(Indexed(data), batch_size=16, sampler=progress.sampler)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    accelerator.register_for_checkpointing(progress)
    if resume:
        accelerator.load_state(folder)
    for epoch in range(progress.next_epoch, epochs):
        progress.begin_epoch(epoch)
        loader.set_epoch(epoch)
        for inputs, target, indices in loader:
            loss = progress.update(indices, network(inputs), target).mean_loss()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            steps -= 1
            if steps == 0:
                accelerator.save_state(folder)
                where = f"epoch {epoch}, after {progress.position} of its samples"
                return accelerator.print(f"The first training stopped in {where}.")
    correct = sum(int(network(image).argmax() == label) for image, label in test)
    accelerator.print(f"The second one has a test accuracy of {100 * correct / 450:.2f} %.")


Accelerator(cpu=True)  # starts torch.distributed where there are several processes
with tempfile.TemporaryDirectory() as own:
    folder = broadcast_object_list([own])[0]  # all processes use the folder of the first one
    train(folder, resume=False, steps=100)
    train(folder, resume=True)
