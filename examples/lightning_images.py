"""Trains a network for images by Lightning on the samples with the smallest margins.

    python examples/lightning_images.py

takes a few seconds on one CPU: the digits of scikit-learn. With the folder of Fashion-MNIST as
argument it takes minutes. Lightning alone would not need the three lines that end with "# ours".
It would have shuffle=True in place of sampler=sampler, and training_step could return the loss.
"""

import logging
import sys
import warnings

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from marginops.commands.data import load_digits, load_fashion_mnist
from marginops.integrations.lightning import MarginCallback
from marginops.training import Indexed, MarginSampler, TrainingDynamics

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers")
data = load_fashion_mnist(sys.argv[1]) if len(sys.argv) > 1 else load_digits()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        filters = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.network = nn.Sequential(filters, nn.Flatten(), nn.Linear(256, 10))

    def training_step(self, batch):
        images, target, *_ = batch
        logits = self.network(images)
        return {"loss": nn.functional.cross_entropy(logits, target), "logits": logits}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.003)


torch.manual_seed(0)
train = TensorDataset(data.train_inputs, data.train_target)
sampler = MarginSampler(TrainingDynamics(len(train)))  # ours
train = Indexed(train)  # ours
loader = DataLoader(train, batch_size=32, sampler=sampler)
quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
trainer = lightning.Trainer(
    max_epochs=10,
    accelerator="cpu",
    callbacks=MarginCallback(sampler),  # ours
    **dict.fromkeys(quiet, False),
)
model = Classifier()
trainer.fit(model, loader)

correct = model.network(data.test_inputs).argmax(1) == data.test_target
visits = int(sampler.dynamics.count.sum())
print(f"Test accuracy after {visits} visits: {100 * correct.float().mean():.2f} %.")
