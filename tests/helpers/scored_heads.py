"""Functions at the top of a module, as a Scorer takes them, and rows to score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import scipy.special
import torch
from torch import Tensor, nn

CLASSES, WIDTH = 5, 8


def linear() -> nn.Linear:
    layer = nn.Linear(WIDTH, CLASSES)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
    return layer


def pair() -> tuple[Tensor, Tensor]:
    layer = linear()
    return layer.weight, layer.bias


def double_pair() -> tuple[Tensor, Tensor]:
    weight, bias = pair()
    return weight.double(), bias.double()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 1, 3), nn.Flatten(), linear())


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


class Noted(nn.Module):
    """Logits of a linear layer in a mapping. The layer before drops inputs in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.layer = linear()

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        assert not torch.is_grad_enabled()
        return {"logits": self.layer(self.dropout(values))}


def noted() -> nn.Module:
    return Noted()


class Words(nn.Module):
    """The length of each text and its first letter, as two logits."""

    def forward(self, texts: list[str]) -> Tensor:
        assert isinstance(texts, list)
        return torch.tensor([[float(len(text)), float(ord(text[0]) - 96)] for text in texts])


def words() -> nn.Module:
    return Words()


def needs_an_argument(width: int) -> None: ...


def number() -> int:
    return 3


def fixed_lists(values: np.ndarray[Any, Any]) -> pa.Array:
    """The rows of a matrix as lists of fixed size."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def expected(
    logits: np.ndarray[Any, Any],
    label: np.ndarray[Any, Any],
    features: np.ndarray[Any, Any],
    weight: np.ndarray[Any, Any],
) -> dict[str, np.ndarray[Any, Any]]:
    """All statistics by their formulas, in float64."""
    rows = np.arange(len(logits))
    order = np.argsort(-logits, axis=1, kind="stable")
    first, second = order[:, 0], order[:, 1]
    others = logits.copy()
    others[rows, label] = -np.inf
    rival = others.argmax(1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    residual = p.copy()
    residual[rows, label] -= 1
    top2 = logits[rows, first] - logits[rows, second]
    el2n = np.linalg.norm(residual, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(1)
        distance = top2 / np.linalg.norm(weight[first] - weight[second], axis=1)
    return {
        "margin": logits[rows, label] - logits[rows, rival],
        "rival": rival,
        "top2_margin": top2,
        "loss": scipy.special.logsumexp(logits, axis=1) - logits[rows, label],
        "confidence": p[rows, label],
        "entropy": entropy,
        "correct": first == label,
        "el2n": el2n,
        "gradient_norm": el2n * np.sqrt(1 + (features**2).sum(1)),
        "prediction": first,
        "minimal_margin": distance,
        "probability_margin": p[rows, first] - p[rows, second],
    }
