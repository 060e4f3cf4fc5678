"""Scores and margins, alone and with selection, against PyTorch code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import marginops
from conftest import DEVICE, PROVIDERS, compiled, make_values

SHAPES = [
    (1280, 10, 512),
    (1280, 100, 512),
    (8192, 1000, 2048),
    (4096, 32000, 768),
    (1_000_000, 10, 64),
    (1_000_000, 100, 64),
]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
# For a GPU: training batches, and logits larger than the cache in short, long and few rows.
BATCHES = [(1280, 10, 512), (1280, 100, 512), (1280, 1000, 512)]
LARGE = [(10_000_000, 10), (1_000_000, 100), *((2**27 // c, c) for c in (1024, 8192, 131_072))]
FEW_ROWS = (4, 1_000_000)
VALUES = ("tied", "sorted", "equal", "infinite")


def eager_score(logits: Tensor, weight: Tensor) -> Tensor:
    values, classes = logits.topk(2, dim=1)
    distance = (weight[classes[:, 0]] - weight[classes[:, 1]]).norm(dim=1)
    return (values[:, 0] - values[:, 1]) / distance


def eager_select(logits: Tensor, weight: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    return eager_score(logits, weight).topk(k, largest=False)


def eager_margin(logits: Tensor, target: Tensor) -> Tensor:
    own = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf)
    return own - others.amax(1)


def exact_score(logits: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The score in float64, and whether the two largest logits decide it without a tie."""
    table, scores, decided = weight.double(), [], []
    for part in logits.split(100_000):
        values, classes = part.double().sort(dim=1, descending=True, stable=True)
        distance = (table[classes[:, 0]] - table[classes[:, 1]]).norm(dim=1)
        scores.append((values[:, 0] - values[:, 1]) / distance)
        decided.append(values[:, 1] != values[:, 2])
    return torch.cat(scores), torch.cat(decided)


def make_logits(rows: int, classes: int, dtype: torch.dtype, values: str = "random") -> Tensor:
    torch.manual_seed(0)
    logits = torch.randn(rows, classes, device=DEVICE)
    if values == "few pairs":  # as of a trained network, where a class has the same rivals
        prototypes = torch.randn(classes, classes, device=DEVICE)
        logits = prototypes[torch.randint(classes, (rows,), device=DEVICE)] + logits / 5
    return make_values(values, logits).to(dtype)


def eager_select_margin(logits: Tensor, target: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    return eager_margin(logits, target).topk(k, largest=False)


# The code that each op replaces.
EAGER = {
    "minimal_margin_score": eager_score,
    "classification_margin": eager_margin,
    "select_minimal_margin": eager_select,
    "select_classification_margin": eager_select_margin,
}


def provided(provider: str, op: str) -> Callable[..., Any]:
    if provider == "triton":
        from triton_score import triton_score

        return triton_score
    if provider == "floor":
        return lambda logits, *_, **__: logits.amax(1)
    if provider == "marginops":
        return getattr(marginops, op)
    return compiled(EAGER[op]) if provider == "compile" else EAGER[op]


def least_other_bytes(other: Tensor, rows: int) -> int:
    """The bytes of a whole target, or of two rows of a weight for each sample."""
    if other.dim() == 1:
        return other.numel() * other.element_size()
    return min(len(other), 2 * rows) * other.shape[1] * other.element_size()


# op, shape, values
CASES = [
    *(("select_minimal_margin", shape, "random") for shape in SHAPES),
    *(("select_minimal_margin", shape, "few pairs") for shape in SHAPES[1:3]),
    *(("minimal_margin_score", SHAPES[i], "random") for i in (0, 2, 5)),
    *(
        (op, shape, "random")
        for op in ("classification_margin", "select_classification_margin")
        for shape in ((1280, 10), (8192, 1000), (1_000_000, 100))
    ),
]
GPU_CASES = [
    *(("select_minimal_margin", shape, "random") for shape in BATCHES),
    *(("select_classification_margin", shape[:2], "random") for shape in BATCHES),
    *(("minimal_margin_score", (*shape, 64), "random") for shape in (*LARGE, FEW_ROWS)),
    *(("classification_margin", shape, "random") for shape in (*LARGE, FEW_ROWS)),
    *(("minimal_margin_score", (*LARGE[2], 64), values) for values in VALUES),
]


@pytest.mark.parametrize("provider", [*PROVIDERS, "triton", "floor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shape", "values"), CASES if DEVICE == "cpu" else GPU_CASES)
def bench_margin(time_call, op, shape, values, dtype, provider):
    rows, classes, *columns = shape
    if provider == "triton" and (DEVICE == "cpu" or op != "minimal_margin_score"):
        pytest.skip("the Triton kernel computes the score on a GPU")
    if DEVICE != "cpu" and (provider == "floor" or (provider == "compile" and rows > 10_000)):
        pytest.skip("on a GPU a copy is the floor, and few shapes are worth compiling for")
    logits = make_logits(rows, classes, dtype, values)
    if columns:
        other = torch.randn(classes, *columns, device=DEVICE).to(dtype)
        exact, decided = exact_score(logits, other)
    else:
        other = torch.randint(classes, (rows,), device=DEVICE)
        exact = eager_margin(logits.double(), other)
        decided = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    selected = rows // 10 if op.startswith("select") else 0
    options = {"k": selected} if selected else {}
    rounding = 1e-4 if dtype == torch.float32 else 2e-2

    def close(scores, expected):
        torch.testing.assert_close(
            scores.double(), expected, rtol=rounding, atol=rounding * 1e-1, equal_nan=True
        )

    def check(result):
        if provider == "floor":
            return
        scores, rows = result if selected else (result, slice(None))
        if provider == "marginops":
            close(scores, exact[rows])
            if selected:
                close(scores, exact.sort().values[:selected])
        else:  # others may choose any of the tied classes
            close(scores[decided[rows]], exact[rows][decided[rows]])

    call = provided(provider, op)
    time_call(
        lambda: call(logits, other, **options),
        check,
        op=op,
        shape=" x ".join(map(str, shape)) + ("" if values == "random" else f", {values}"),
        dtype=dtype,
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
        other_bytes=least_other_bytes(other, rows) + (12 * selected or 4 * rows),
    )
