"""MarginDistribution.update against PyTorch and a single reading."""

import pytest
import torch

from conftest import DEVICE
from marginops.metrics import MarginDistribution

SIZES = [1_000, 100_000, 1_000_000, 10_000_000]
KINDS = ["random", "equal", "tied", "ignored"]


def make_margins(kind: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    margins = torch.randn(size, device=DEVICE) * 3 + 1
    if kind == "equal":
        margins.fill_(0.7)
    elif kind == "tied":
        margins.round_()
    elif kind == "ignored":
        margins[::10] = torch.inf
    return margins.to(dtype)


def cases():
    for size in SIZES:
        yield "random", size, torch.float32
    for dtype in (torch.float64, torch.bfloat16):
        yield "random", 1_000_000, dtype
    for kind in KINDS[1:]:
        yield kind, 1_000_000, torch.float32


@pytest.mark.parametrize("provider", ["marginops", "eager", "floor"])
@pytest.mark.parametrize(("kind", "size", "dtype"), cases())
def bench_margin_distribution(time_call, kind, size, dtype, provider):
    margins = make_margins(kind, size, dtype)
    metric = MarginDistribution().to(DEVICE)
    kept = margins[margins != torch.inf].double()

    def eager():
        finite = margins[margins.isfinite()] if kind == "ignored" else margins
        return torch.histc(finite.float(), 100), finite.mean(), finite.amin(), finite.amax()

    def check(result):
        if provider == "marginops":
            summary = metric.compute()
            torch.testing.assert_close(summary.mean, kept.mean(), rtol=1e-12, atol=1e-12)
            assert summary.minimum == kept.min() and summary.maximum == kept.max()
            assert summary.count == len(kept) and summary.count == metric.bin_counts.sum()
        elif provider == "eager":
            assert result[0].sum() == len(kept)
            assert result[2] == kept.min() and result[3] == kept.max()
        else:
            assert result.dtype == dtype

    call = {
        "marginops": lambda: metric.update(margins),
        "eager": eager,
        "floor": lambda: margins.sum(),  # one reading
    }[provider]
    time_call(
        call,
        check,
        op="MarginDistribution.update",
        shape=f"{size}" + ("" if kind == "random" else f", {kind}"),
        dtype=str(dtype).removeprefix("torch."),
        provider=provider,
        bytes_read=margins.numel() * margins.element_size(),
    )
