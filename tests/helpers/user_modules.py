"""Modules of a user, with data sets and networks, for the commands that take them by name."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Images of three classes that differ in brightness, and sentences whose class is their first token.
DATA = """
import torch

def images():
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(180) % 3
    inputs = torch.randn(180, 1, 8, 8, generator=generator) + 2 * target[:, None, None, None]
    return inputs[:150], target[:150], inputs[150:], target[150:]

def arrays():
    return [part.double().numpy() if part.dim() > 1 else part.int().numpy() for part in images()]

def sentences():
    tokens = torch.randint(3, 20, (180, 7), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = torch.arange(180) % 3
    return tokens[:150], tokens[:150, 0], tokens[150:], tokens[150:, 0]
"""
MODELS = """
import torch
from torch import nn

def conv(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.1), nn.Linear(6, num_classes),
    )

class Encoder(nn.Module):
    def __init__(self, embedding, num_classes):
        super().__init__()
        self.embedding = embedding
        self.block = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
        self.head = nn.Linear(12, num_classes)

    def forward(self, inputs):
        return {"logits": self.head(self.block(self.embedding(inputs)).mean(1))}

def text(num_classes):
    return Encoder(nn.Embedding(20, 12), num_classes)

def vision(num_classes):
    patches = nn.Sequential(nn.Unfold(4, stride=4), Transpose(), nn.Linear(16, 12))
    return Encoder(patches, num_classes)

class Transpose(nn.Module):
    def forward(self, inputs):
        return inputs.mT

class Bag(nn.Module):
    # It has rates, but no product of norms.
    def __init__(self, num_classes):
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.head = nn.Linear(12, num_classes)

    def forward(self, tokens):
        return self.head(input=self.embedding(tokens).mean(1).relu())

def two_of_a_width(num_classes):
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, num_classes), nn.ReLU(), nn.Linear(num_classes, num_classes)
    )
    return network

def with_its_layer(num_classes):
    network = two_of_a_width(num_classes)
    return network, network[-1]
"""


@contextmanager
def user_modules(folder: Path) -> Iterator[None]:
    """Make ``folder`` the current one, with the modules of a user. They are forgotten later."""
    (folder / "own").mkdir()
    (folder / "own/data.py").write_text(DATA)
    (folder / "own/models.py").write_text(MODELS)
    importlib.invalidate_caches()
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", [*sys.path])
        yield
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("own", "broken"):
            del sys.modules[name]
