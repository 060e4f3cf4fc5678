"""The four properties of neural collapse in two passes, against the package neural-collapse."""

import pytest
import torch
from torch import Tensor

from conftest import DEVICE, peer
from marginops.metrics import NeuralCollapse

SHAPES = [(10_000, 128, 10), (20_000, 256, 50)]  # N, D, C
BATCH = 1000

Batches = list[tuple[Tensor, Tensor, Tensor]]


def own_collapse(batches: Batches, weight: Tensor, two_passes: bool) -> tuple[float, float]:
    """NC1 and NC4, with NC2 and NC3."""
    metric = NeuralCollapse(*weight.shape, two_passes=two_passes).to(DEVICE)
    for input, target, _ in batches:
        metric.update(input, target, weight)
    for input, target, logits in batches:
        metric.update_nearest(input, logits, target)
    summary = metric.compute()
    return float(summary.nc1), float(summary.nc4)


def peer_collapse(batches: Batches, weight: Tensor) -> tuple[float, float]:
    """The same as its README computes it, in float32. Its NC1 has another factor."""
    from neural_collapse import accumulate, measure

    sizes = (*weight.shape, DEVICE)
    mean = accumulate.MeanAccumulator(*sizes)
    for input, target, _ in batches:
        mean.accumulate(input, target)
    means, center = mean.compute()
    scatter = accumulate.CovarAccumulator(*sizes)
    for input, target, _ in batches:
        scatter.accumulate(input, target, means)
    within = scatter.compute()
    decisions = accumulate.DecAccumulator(*sizes)
    for input, target, _ in batches:
        decisions.accumulate(input, target, means, weight)
    measure.simplex_etf_error(means, center)
    measure.self_duality_error(means, weight, center)
    nc1 = measure.covariance_pinv(means, within, center, svd=True)
    agreement = measure.clf_ncc_agreement(decisions)
    return nc1 / weight.shape[1], 1 - agreement


@pytest.mark.parametrize("provider", ["marginops", "neural_collapse"])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_collapse(time_call, shape, two_passes, provider):
    rows, features, classes = shape
    torch.manual_seed(0)
    target = torch.arange(rows, device=DEVICE) % classes
    weight = torch.randn(classes, features, device=DEVICE)
    input = weight[target] + 2 * torch.randn(rows, features, device=DEVICE)
    logits = input @ weight.T
    batches = list(zip(input.split(BATCH), target.split(BATCH), logits.split(BATCH), strict=True))
    expected = own_collapse([(h.double(), y, z) for h, y, z in batches], weight, False)

    def call() -> tuple[float, float]:
        if provider == "marginops":
            return own_collapse(batches, weight, two_passes)
        return peer_collapse(batches, weight)

    def check(result: tuple[float, float]) -> None:
        # In float32 the other package decides otherwise where two means are almost equally near.
        assert result == pytest.approx(expected, rel=1e-3, abs=1e-3)

    if provider != "marginops":
        peer(provider, call, check)
    time_call(
        call,
        check,
        op="NeuralCollapse(two_passes=True)" if two_passes else "NeuralCollapse",
        shape=" x ".join(map(str, shape)),
        dtype=torch.float32,
        provider=provider,
        bytes_read=2 * input.numel() * input.element_size(),
        other_bytes=0,
    )
