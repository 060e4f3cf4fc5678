"""select_smallest against ``torch.topk`` and flashinfer, on random and harder scores."""

import pytest
import torch
from torch import Tensor

import marginops
from conftest import DEVICE, make_values, peer

SIZES = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]
if DEVICE != "cpu":
    SIZES.append(100_000_000)


def cases():
    for size in SIZES:
        for k in dict.fromkeys((10, size // 100, size // 10, size // 2)):
            yield "random", size, k
    for kind in ("tied", "sorted", "equal", "infinite"):
        yield kind, 1_000_000, 100_000


def flashinfer_top_k(negated: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest by flashinfer, which only finds the largest."""
    import flashinfer

    values, indices = flashinfer.top_k(negated.unsqueeze(0), k, sorted=True)
    return -values[0], indices[0]


@pytest.mark.parametrize("provider", ["marginops", "topk", "flashinfer"])
@pytest.mark.parametrize(("kind", "size", "k"), cases())
def bench_select_smallest(time_call, kind, size, k, provider):
    if provider == "flashinfer" and DEVICE == "cpu":
        pytest.skip("flashinfer needs a GPU")
    torch.manual_seed(0)
    scores = make_values(kind, torch.randn(size, device=DEVICE))
    negated = -scores
    expected = scores.sort(stable=True)

    def check(result):
        assert torch.equal(result[0], expected.values[:k])
        if provider == "marginops":
            assert torch.equal(result[1], expected.indices[:k])

    call = {
        "marginops": lambda: marginops.select_smallest(scores, k),
        "topk": lambda: scores.topk(k, largest=False, sorted=True),
        "flashinfer": lambda: flashinfer_top_k(negated, k),
    }[provider]
    if provider == "flashinfer":
        peer("flashinfer", call, check)
    time_call(
        call,
        check,
        op="select_smallest",
        shape=f"{size}, k = {k}" + ("" if kind == "random" else f", {kind}"),
        dtype="float32",
        provider=provider,
        bytes_read=scores.numel() * scores.element_size(),
        other_bytes=12 * k,
    )
