"""Selection alone against ``torch.topk``, on random scores and on those that hurt selections."""

import pytest
import torch

import marginops
from conftest import DEVICE

SIZES = [1_000, 10_000, 100_000, 1_000_000, 10_000_000]


def make_scores(kind: str, size: int) -> torch.Tensor:
    torch.manual_seed(0)
    scores = torch.randn(size, device=DEVICE)
    if kind == "tied":
        return scores.mul(2).round()
    if kind == "sorted":
        return scores.sort().values
    if kind == "equal":
        return torch.ones_like(scores)
    if kind == "infinite":
        return torch.where(scores > 0, torch.inf, scores)
    return scores


def cases():
    for size in SIZES:
        for k in dict.fromkeys((10, size // 100, size // 10, size // 2)):
            yield "random", size, k
    for kind in ("tied", "sorted", "equal", "infinite"):
        yield kind, 1_000_000, 100_000


@pytest.mark.parametrize("provider", ["marginops", "topk"])
@pytest.mark.parametrize(("kind", "size", "k"), cases())
def bench_select_smallest(time_call, kind, size, k, provider):
    scores = make_scores(kind, size)
    expected = scores.sort(stable=True)

    def check(result):
        assert torch.equal(result[0], expected.values[:k])
        if provider == "marginops":
            assert torch.equal(result[1], expected.indices[:k])

    call = {
        "marginops": lambda: marginops.select_smallest(scores, k),
        "topk": lambda: scores.topk(k, largest=False, sorted=True),
    }[provider]
    time_call(
        call,
        check,
        op="select_smallest",
        shape=f"{size}, k = {k}" + ("" if kind == "random" else f", {kind}"),
        dtype="float32",
        provider=provider,
        bytes_read=scores.numel() * scores.element_size(),
    )
