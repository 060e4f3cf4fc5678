"""Count, mean and radius of every class, against PyTorch code and a single reading."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import marginops
from bench_margin import DTYPES
from conftest import DEVICE

SHAPES = [(100_000, 512, 100), (100_000, 64, 10), (50_000, 512, 1000)]  # N, D, C
if DEVICE != "cpu":
    SHAPES = [(1_000_000, 512, 1000), (1_000_000, 64, 10), (1_000_000, 512, 1)]


def rows_of(input: Tensor, normalize: bool) -> Tensor:
    rows = input if input.dtype == torch.float64 else input.float()
    return F.normalize(rows) if normalize else rows


def eager_moments(
    input: Tensor, target: Tensor, classes: int, normalize: bool
) -> tuple[Tensor, ...]:
    rows = rows_of(input, normalize)
    count = torch.bincount(target, minlength=classes)
    mean = rows.new_zeros(classes, rows.shape[1]).index_add_(0, target, rows) / count.unsqueeze(1)
    square = (rows - mean[target]).square().sum(1)
    return count, mean, (rows.new_zeros(classes).index_add_(0, target, square) / count).sqrt()


def one_hot_moments(
    input: Tensor, target: Tensor, classes: int, normalize: bool
) -> tuple[Tensor, ...]:
    rows = rows_of(input, normalize)
    member = F.one_hot(target, classes).to(rows.dtype)
    count = member.sum(0)
    mean = member.T @ rows / count.unsqueeze(1)
    square = (rows - member @ mean).square().sum(1)
    return count.long(), mean, (square @ member / count).sqrt()


def fused(input: Tensor, target: Tensor, classes: int, normalize: bool) -> tuple[Tensor, ...]:
    return marginops.class_moments(input, target, classes, normalize=normalize)


@pytest.mark.parametrize("provider", ["marginops", "eager", "one_hot", "floor"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalize"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_moments(time_call, shape, dtype, normalize, provider):
    if normalize and shape != SHAPES[0]:
        pytest.skip("one shape shows what it costs")
    rows, columns, classes = shape
    input = torch.randn(rows, columns, device=DEVICE).to(dtype)
    target = torch.randint(classes, (rows,), device=DEVICE)
    if provider == "floor":
        exact = input.double().sum()

        def call() -> Tensor:
            return input.sum(dtype=torch.float32)

        def check(result: Tensor) -> None:
            torch.testing.assert_close(result.double(), exact, rtol=1e-3, atol=10)

    else:
        moments = {"marginops": fused, "eager": eager_moments, "one_hot": one_hot_moments}[provider]
        expected = eager_moments(input.double(), target, classes, normalize)

        def call() -> tuple[Tensor, ...]:
            return moments(input, target, classes, normalize)

        def check(result: tuple[Tensor, ...]) -> None:
            for value, wanted in zip(result, expected, strict=True):
                torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-4, atol=1e-4)

    time_call(
        call,
        check,
        op="class_moments, normalize=True" if normalize else "class_moments",
        shape=" x ".join(map(str, shape)),
        dtype=dtype,
        provider=provider,
        bytes_read=input.numel() * input.element_size(),
        other_bytes=8 * rows + 4 * classes * (columns + 3),
    )
