"""Scores of logits, and score with selection, against what a user would write in PyTorch."""

import pytest
import torch
from torch import Tensor

import marginops
from conftest import DEVICE, PROVIDERS, compiled

SHAPES = [
    (1280, 10, 512),
    (1280, 100, 512),
    (8192, 1000, 2048),
    (4096, 32000, 768),
    (1_000_000, 10, 64),
    (1_000_000, 100, 64),
]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]


def eager_score(logits: Tensor, weight: Tensor) -> Tensor:
    values, classes = logits.topk(2, dim=1)
    distance = (weight[classes[:, 0]] - weight[classes[:, 1]]).norm(dim=1)
    return (values[:, 0] - values[:, 1]) / distance


def eager_select(logits: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return eager_score(logits, weight).topk(k, largest=False)


def eager_margin(logits: Tensor, target: Tensor) -> Tensor:
    own = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, target.unsqueeze(1), -torch.inf)
    return own - others.amax(1)


def exact_score(logits: Tensor, weight: Tensor) -> Tensor:
    """The score in float64, chunk by chunk."""
    table = weight.double()
    parts = [eager_score(part.double(), table) for part in logits.split(100_000)]
    return torch.cat(parts)


def make_logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, classes, device=DEVICE).to(dtype)


def eager_select_margin(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return eager_margin(logits, target).topk(k, largest=False)


# What each op replaces.
EAGER = {
    "minimal_margin_score": eager_score,
    "classification_margin": eager_margin,
    "select_minimal_margin": eager_select,
    "select_smallest_margin": eager_select_margin,
}
CASES = [
    *(("select_minimal_margin", shape) for shape in SHAPES),
    *(("minimal_margin_score", SHAPES[i]) for i in (0, 2, 5)),
    *(
        (op, shape)
        for op in ("classification_margin", "select_smallest_margin")
        for shape in ((1280, 10), (8192, 1000), (1_000_000, 100))
    ),
]


@pytest.mark.parametrize("provider", [*PROVIDERS, "floor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "shape"), CASES)
def bench_margin(time_call, op, shape, dtype, provider):
    rows, classes, *columns = shape
    logits = make_logits(rows, classes, dtype)
    if columns:
        other = torch.randn(classes, *columns, device=DEVICE).to(dtype)
        exact = exact_score(logits, other)
    else:
        other = torch.randint(classes, (rows,), device=DEVICE)
        exact = eager_margin(logits.double(), other)
    arguments = (logits, other, rows // 10) if op.startswith("select") else (logits, other)
    rounding = 1e-4 if dtype == torch.float32 else 2e-2

    def check(result):
        if provider == "floor":
            return
        if op.startswith("select"):  # the scores, and those of the indices
            expected = exact.sort().values[: rows // 10]
            pairs = [(result[0].double(), expected), (exact[result[1]], expected)]
        else:
            pairs = [(result.double(), exact)]
        for value, expected in pairs:
            torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding * 1e-1)

    call = {
        "marginops": getattr(marginops, op),
        "eager": EAGER[op],
        "compile": compiled(EAGER[op]),
        "floor": lambda logits, *_: logits.amax(1),
    }[provider]
    time_call(
        lambda: call(*arguments),
        check,
        op=op,
        shape=" x ".join(map(str, shape)),
        dtype=str(dtype).removeprefix("torch."),
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
    )
