"""The second pass of neural collapse decides as exact distances do, and needs few of them."""

import math

import pytest
import torch

from marginops.metrics import _nearest, _second_pass


def exactly(input, logits, centers):
    """Distances one by one, in float64."""
    difference = input.double().unsqueeze(1) - centers
    nearest = difference.square().sum(2).sqrt().argmin(1)
    return (logits.argmax(1) != nearest).double()


def cases():
    """Features and centers that rounding makes hard to compare."""
    for features in (1, 3, 64, 300):
        centers = torch.randn(7, features, dtype=torch.float64)
        input = centers[torch.arange(500) % 7] + torch.randn(500, features) * 0.3
        yield "clusters", input, centers
        yield "far from the origin", input + 1e8, centers + 1e8
        yield "tiny", input * 1e-170, centers * 1e-170
        yield "subnormal squares", input * 1e-161, centers * 1e-161
        yield "huge", input * 1e150, centers * 1e150
        middle = (centers[torch.arange(500) % 7] + centers[torch.arange(500) // 7 % 7]) / 2
        yield "between two", middle, centers
        for scale in (1e-23, 1e-21, 1e20):  # squares leave the range of float32
            yield f"between two, {scale}", middle * scale, centers * scale
        step = 2.0**-51 * torch.randint(-4, 5, (500, features))
        yield "next to the middle", middle * (1 + step), centers
        yield "equal centers", input, centers[[0, 1, 1, 2, 0, 3, 3]]
        close = centers[:1] + 1e-9 * torch.randn(7, features, dtype=torch.float64)
        yield "close centers", close[torch.arange(500) % 7] + 1e-10 * torch.randn_like(input), close
        grid = torch.randint(-1, 2, (500, features)).double()
        yield "grid", grid, torch.randint(-1, 2, (7, features)).double()


def test_decisions_are_those_of_exact_distances():
    for name, input, centers in cases():
        logits = torch.randn(500, 7).mul(2).round()
        actual = _nearest.differs_from_nearest(input, logits, centers)
        assert torch.equal(actual, _nearest.differs_exactly(input, logits, centers)), name
        if name in ("clusters", "far from the origin", "equal centers", "grid"):
            assert torch.equal(actual, exactly(input, logits, centers)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_decisions_of_two_passes_are_those_of_exact_distances(dtype):
    for name, input, centers in cases():
        logits = torch.randn(500, 7).mul(2).round()
        rows = input.to(dtype)
        expected = _nearest.differs_exactly(rows.double(), logits, centers)
        second = _second_pass.SecondPass(centers)
        for label in (torch.arange(500) % 7, torch.randint(0, 7, (500,))):
            _, actual = second._compare_part(rows, logits, label)
            assert torch.equal(actual.nan_to_num(9), expected.nan_to_num(9)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_errors_of_the_product_are_within_the_bound(dtype):
    """The largest error of all orders, against an exact order, stays below what is safe."""
    for name, input, centers in cases():
        second = _second_pass.SecondPass(centers)
        if name not in ("clusters", "far from the origin", "between two", "close centers", "grid"):
            continue
        if dtype not in second._forms:
            continue
        seen = []

        def keep(order, logits, bound, seen=seen):
            seen.append((order.clone(), bound))
            return _nearest.decide(order, logits, bound)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_second_pass, "decide", keep)
            label = torch.arange(500) % 7
            second._multiply(dtype, input.to(dtype), torch.zeros(500, 7), label)
        ((order, bound),) = seen
        rows = input.to(dtype).double().numpy().astype("longdouble")
        means = centers.numpy().astype("longdouble")
        squares = ((rows[:, None] - means) ** 2).sum(2)
        exact = torch.from_numpy((squares - squares[:, :1]).astype("float64")).T
        error = ((order - order[:1]).double() - exact).abs().amax(0)
        assert (error < bound).all(), name


def test_samples_without_a_finite_distance():
    input, centers = torch.randn(6, 4), torch.randn(3, 4, dtype=torch.float64)
    input[1, 2], input[2, 0] = math.nan, math.inf
    logits = torch.randn(6, 3)
    logits[3, 1] = math.nan
    differs = _nearest.differs_from_nearest(input, logits, centers)
    assert differs.isnan().tolist() == [False, True, True, True, False, False]
    kept = [0, 4, 5]
    assert torch.equal(differs[kept], exactly(input[kept], logits[kept], centers))
    huge = torch.full((1, 4), 1e200, dtype=torch.float64)
    assert _nearest.differs_from_nearest(huge, logits[:1], centers).isnan().all()
    centers[2] = math.nan
    assert _nearest.differs_from_nearest(input, logits, centers).isnan().all()


@pytest.mark.parametrize("rows", [0, 1, 2048, 2049, 5000])
def test_any_number_of_rows(rows):
    input, centers = torch.randn(rows, 5), torch.randn(4, 5, dtype=torch.float64)
    logits = torch.randn(rows, 4)
    differs = _nearest.differs_from_nearest(input, logits, centers)
    assert torch.equal(differs, exactly(input, logits, centers))


def test_few_samples_need_exact_distances(monkeypatch):
    counted = []

    def count(input, logits, centers):
        counted.append(len(input))
        return torch.zeros(len(input), dtype=torch.float64)

    monkeypatch.setattr(_nearest, "differs_exactly", count)
    centers = torch.randn(10, 64, dtype=torch.float64) + 1e6
    input = centers[torch.arange(20_000) % 10] + torch.randn(20_000, 64)
    input[17] = (centers[3] + centers[5]) / 2
    logits = torch.zeros(20_000, 10)
    logits[17, 5] = 1
    _nearest.differs_from_nearest(input, logits, centers)
    assert sum(counted) <= 20


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_few_samples_of_two_passes_need_exact_distances(monkeypatch, dtype):
    counted = []

    def count(input, logits, centers):
        counted.append(len(input))
        return torch.zeros(len(input), dtype=torch.float64)

    monkeypatch.setattr(_second_pass, "differs_exactly", count)
    centers = torch.randn(10, 64, dtype=torch.float64) + 100
    input = centers[torch.arange(20_000) % 10] + torch.randn(20_000, 64)
    input[17] = (centers[3] + centers[5]) / 2
    logits = torch.zeros(20_000, 10)
    logits[17, 5] = 1
    second = _second_pass.SecondPass(centers)
    second.compare(input.to(dtype), logits, torch.arange(20_000) % 10)
    assert sum(counted) <= 20
    unsure = second._multiply(dtype, input.to(dtype), logits, torch.arange(20_000) % 10)[2]
    assert len(unsure) < 200
