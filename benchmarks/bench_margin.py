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


@pytest.mark.parametrize("provider", [*PROVIDERS, "floor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes", "columns"), SHAPES)
def bench_select_minimal_margin(time_call, rows, classes, columns, dtype, provider):
    logits = make_logits(rows, classes, dtype)
    weight = torch.randn(classes, columns, device=DEVICE).to(dtype)
    k = rows // 10
    expected = exact_score(logits, weight).sort().values[:k]
    select = {
        "marginops": marginops.select_minimal_margin,
        "eager": eager_select,
        "compile": compiled(eager_select),
    }.get(provider)

    def check(result):
        if provider != "floor":
            rounding = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(
                result[0].double(), expected, rtol=rounding, atol=rounding * 1e-2
            )

    time_call(
        (lambda: select(logits, weight, k)) if select else (lambda: logits.amax(1)),
        check,
        op="select_minimal_margin",
        shape=f"{rows} x {classes} x {columns}",
        dtype=str(dtype).removeprefix("torch."),
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
    )


@pytest.mark.parametrize("provider", [*PROVIDERS, "floor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1280, 10), (8192, 1000), (1_000_000, 100)])
def bench_classification_margin(time_call, rows, classes, dtype, provider):
    logits = make_logits(rows, classes, dtype)
    target = torch.randint(classes, (rows,), device=DEVICE)
    expected = torch.cat(
        [
            eager_margin(part.double(), label)
            for part, label in zip(logits.split(100_000), target.split(100_000), strict=True)
        ]
    )
    margin = {
        "marginops": marginops.classification_margin,
        "eager": eager_margin,
        "compile": compiled(eager_margin),
    }.get(provider)

    def check(result):
        if provider != "floor":
            rounding = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(result.double(), expected, rtol=rounding, atol=rounding)

    time_call(
        (lambda: margin(logits, target)) if margin else (lambda: logits.amax(1)),
        check,
        op="classification_margin",
        shape=f"{rows} x {classes}",
        dtype=str(dtype).removeprefix("torch."),
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
    )
