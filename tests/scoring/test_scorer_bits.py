"""The same rows give the same bits, wherever they lie in the memory and whatever the caller set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from marginops.scoring import (
    Margins,
    Moments,
    Scorer,
    Smallest,
    SmallestPerClass,
    SuspiciousLabels,
)

# Products of few classes depend on where the memory begins, and on the precision that is set.
ROWS, WIDTH, CLASSES = 2100, 61, 9
LONG = 3001  # so wide that fewer rows fit into a tile
Values = np.ndarray[Any, np.dtype[Any]]
NAMES = ("margin", "loss", "minimal_margin", "prediction", "gradient_norm")


def head() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    empty = torch.empty(CLASSES, WIDTH + 1, device="cpu", dtype=torch.float32)
    weight = empty.normal_(generator=generator)
    return weight[:, :WIDTH], weight[:, WIDTH]


def long_head() -> tuple[torch.Tensor, None]:
    generator = torch.Generator("cpu").manual_seed(2)
    return torch.randn(CLASSES, LONG, generator=generator), None


def shifted_head() -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = head()
    return torch.cat((torch.zeros(1), weight.flatten()))[1:].view(CLASSES, WIDTH), bias


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(value) for value in head())

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(values, self.weight, self.bias)


def wide_head() -> tuple[torch.Tensor, None]:
    """So many classes that no buffer holds the logits of a tile."""
    generator = torch.Generator("cpu").manual_seed(1)
    empty = torch.empty(5000, WIDTH, device="cpu", dtype=torch.float32)
    return empty.normal_(generator=generator), None


def features(dtype: str = "float32", width: int = WIDTH) -> Values:
    return np.random.default_rng(0).standard_normal((ROWS, width)).astype(dtype)


def shifted(values: Values, num_bytes: int) -> Values:
    """The same values at an address that is so many bytes behind a multiple of 64."""
    memory = np.empty(values.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + num_bytes
    result = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    result[:] = values
    return result


def assert_same_bits(got: dict[str, Values], wanted: dict[str, Values]) -> None:
    assert [*got] == [*wanted]
    for name, value in wanted.items():
        assert got[name].tobytes() == value.tobytes(), name


def scorers() -> dict[str, Scorer]:
    target: dict[str, Any] = {"target": "label"}
    return {
        "head": Scorer(head, statistics=NAMES, **target),
        "wide": Scorer(wide_head, statistics=NAMES, **target),
        "model": Scorer(model=Model, statistics=("margin", "loss"), **target),
        "logits": Scorer(statistics=("margin", "loss", "entropy"), **target),
    }


@pytest.mark.parametrize("kind", ["head", "wide", "model", "logits"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_where_the_memory_of_the_rows_begins(kind: str, dtype: str) -> None:
    scorer, values = scorers()[kind], features(dtype)
    label = np.arange(ROWS) % CLASSES
    wanted = scorer({"embedding": shifted(values, 0), "label": label})
    for num_bytes in (8, 16, 56) if dtype == "float64" else (4, 8, 16, 36):
        batch = {"embedding": shifted(values, num_bytes), "label": label}
        assert_same_bits(scorer(batch), wanted)


def test_where_the_memory_of_the_head_begins(tmp_path: Path) -> None:
    batch = {"embedding": features(), "label": np.arange(ROWS) % CLASSES}
    wanted = Scorer(head, target="label", statistics=NAMES)(batch)
    tensors = {name: value.contiguous() for name, value in zip("wb", head(), strict=True)}
    layer = {"weight": tensors["w"], "bias": tensors["b"]}
    torch.save(layer, tmp_path / "head.pt")
    places: list[Any] = [shifted_head, tmp_path / "head.pt"]
    for length in range(1, 9):  # the header moves the values
        metadata = {"note": "x" * length}
        places.append(tmp_path / f"{length}.safetensors")
        safetensors.torch.save_file(layer, places[-1], metadata)
    for place in places:
        assert_same_bits(Scorer(place, target="label", statistics=NAMES)(batch), wanted)


def test_long_rows_and_features_that_are_kept() -> None:
    scorer, values = Scorer(long_head, statistics=("top2_margin",)), features("float16", LONG)
    wanted = scorer({"embedding": values})["top2_margin"]
    kept = scorer.score({"embedding": values}, features=True)
    assert kept.values["top2_margin"].numpy().tobytes() == wanted.tobytes()
    for num_bytes in (0, 4):
        batch = {"embedding": shifted(values.astype(np.float32), num_bytes)}
        assert scorer(batch)["top2_margin"].tobytes() == wanted.tobytes()


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
        assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def onednn_precision() -> Iterator[None]:
    matmul: Any = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "medium precision": lambda: precision("medium"),
    "bfloat16 of oneDNN": onednn_precision,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["head", "wide", "model", "logits"])
def test_settings_of_the_caller(setting: str, kind: str) -> None:
    batch = {"embedding": features(), "label": np.arange(ROWS) % CLASSES}
    wanted = scorers()[kind](batch)
    empty = scorers()[kind]
    with SETTINGS[setting]():
        scorer = scorers()[kind]
        assert_same_bits(scorer(batch), wanted)
        values = empty({"embedding": [None] * 3, "label": [0] * 3}) if kind == "head" else {}
        assert all(value.dtype == wanted[name].dtype for name, value in values.items())
    assert_same_bits(scorer(batch), wanted)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_caller_in_reductions(setting: str) -> None:
    label = np.arange(ROWS) % CLASSES
    batch = {"embedding": features(), "label": label, "id": np.arange(ROWS)}
    kinds: list[Callable[[], Any]] = [
        lambda: Smallest(50, "margin"),
        lambda: SmallestPerClass(5, "loss"),
        lambda: Margins("margin"),
        Moments,
        lambda: SuspiciousLabels(9),
    ]

    def results() -> list[Any]:
        found = []
        names = ("margin", "loss", "prediction", "rival", "correct")
        scored = Scorer(head, target="label", id="id", statistics=names).score(batch, features=True)
        for kind in kinds:
            part, whole = kind(), kind()
            part.update(scored)
            for _ in range(2):
                whole.merge(part.state())
            found.append((part.state(), whole.result(), whole.summary()))
        return found

    wanted = results()
    with SETTINGS[setting]():
        got = results()
    for (state, result, summary), (state_, result_, summary_) in zip(got, wanted, strict=True):
        assert state.equals(state_, check_metadata=True)
        assert result.equals(result_)
        assert summary == summary_
