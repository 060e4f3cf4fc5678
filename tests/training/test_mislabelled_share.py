"""The share of wrong labels: found where there are many, 0 where there are none."""

import numpy as np
import pytest
import torch

from marginops.training import (
    MarginSampler,
    SmallestMargins,
    TrainingDynamics,
    mislabelled_share,
)

SIZE = 20_000


def seen(margins: torch.Tensor) -> TrainingDynamics:
    """Dynamics that saw each sample once, with these margins."""
    dynamics = TrainingDynamics(len(margins))
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    dynamics.update(
        torch.arange(len(margins)), logits, torch.zeros(len(margins), dtype=torch.int64)
    )
    return dynamics


def hard_and_easy(size: int, generator: torch.Generator) -> torch.Tensor:
    """One mode above zero, and a tail that falls off below zero: a tenth is negative."""
    normal = torch.randn(size, generator=generator)
    return torch.where(normal > -0.5, normal + 1.5, -3 * (normal + 0.5).abs() + 1)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_lower_mode_is_found_at_any_scale(rate: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(SIZE, generator=generator) < rate
    mode = torch.randn(SIZE, generator=generator) - 5
    margins = torch.where(wrong, mode, hard_and_easy(SIZE, generator)) * scale
    share = mislabelled_share(seen(margins))
    assert 0.6 * rate < share < 1.1 * rate
    hardest = margins.argsort()[: round(share * SIZE)]
    assert wrong[hardest].float().mean() > 0.85


@pytest.mark.parametrize("size", [100, 2000, SIZE])
@pytest.mark.parametrize("seed", range(5))
def test_without_a_lower_mode_the_share_is_zero(size: int, seed: int) -> None:
    margins = hard_and_easy(size, torch.Generator().manual_seed(seed))
    assert (margins < 0).any()
    assert mislabelled_share(seen(margins)) == 0


def test_the_cut_is_half_way_from_the_valley_to_the_peak() -> None:
    # The positive margins have the median 4, so the bins are 1 wide: 300, 100, 20, 10, 90, 200, 40.
    counts = [300, 100, 20, 10, 90, 200, 40]
    negative = [np.full(count, -(place + 0.5)) for place, count in enumerate(counts)]
    margins = torch.tensor(np.concatenate([np.full(1001, 4.0), *negative]), dtype=torch.float32)
    # Valley in bin 3, peak in bin 5: the cut is at -4.5, and half of bin 4 is not below it.
    assert mislabelled_share(seen(margins)) == (200 + 40) / len(margins)


@pytest.mark.parametrize(
    ("valley", "peak", "is_found"),
    [
        (48, 91, False),  # 91 - 48 = 43 is below 4 sqrt(139) = 47
        (36, 91, True),  # 91 - 36 = 55 is above 4 sqrt(127) = 45
        (9100, 10000, False),  # 900 is above 4 sqrt(19100) = 553, but 0.91 is no deep valley
        (8900, 10000, True),
    ],
)
def test_a_valley_must_be_deep_and_certain(valley: int, peak: int, is_found: bool) -> None:
    counts = [peak + 100, valley, peak]
    negative = [np.full(count, -(place + 0.5)) for place, count in enumerate(counts)]
    margins = torch.tensor(np.concatenate([np.full(101, 4.0), *negative]), dtype=torch.float32)
    assert mislabelled_share(seen(margins)) == (peak / len(margins) if is_found else 0)


@pytest.mark.parametrize(("easy", "share"), [(5000, 0.5), (4999, 0.0)])
def test_a_lower_mode_of_most_samples_are_not_wrong_labels(easy: int, share: float) -> None:
    margins = torch.cat([torch.full((easy,), 4.0), torch.full((5000,), -2.5)])
    assert mislabelled_share(seen(margins)) == share


def test_samples_without_a_finite_margin_do_not_count() -> None:
    margins = torch.cat([torch.full((101,), 4.0), torch.full((36,), -1.5), torch.full((91,), -2.5)])
    none = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(500)
    dynamics = seen(torch.cat([margins, torch.zeros(1500)]))
    assert mislabelled_share(dynamics, by=torch.cat([margins, none])) == 91 / 228


@pytest.mark.parametrize("margins", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0], [torch.nan, torch.inf]])
def test_too_little_to_tell(margins: list[float]) -> None:
    dynamics = TrainingDynamics(2)
    assert mislabelled_share(dynamics) == 0
    assert mislabelled_share(dynamics, by=torch.tensor(margins)) == 0
    assert mislabelled_share(seen(torch.tensor(margins))) == 0


def test_a_sampler_leaves_the_lower_mode_out() -> None:
    generator = torch.Generator().manual_seed(0)
    margins = hard_and_easy(SIZE, generator)
    margins[:4000] = torch.randn(4000, generator=generator) - 5
    policy = SmallestMargins(0.4, skip_hardest=mislabelled_share)
    order = torch.tensor(list(MarginSampler(seen(margins), policy)))
    assert len(order) == 0.4 * SIZE
    assert (order < 4000).float().mean() < 0.15
    plain = torch.tensor(list(MarginSampler(seen(margins), SmallestMargins(0.4))))
    assert (plain < 4000).float().mean() > 0.4


def test_wrong_arguments() -> None:
    dynamics = TrainingDynamics(3)
    for name in ("depth", "loss", "confidence"):  # those of TrainingDynamics are no margins
        with pytest.raises(ValueError, match=rf'by: expected "margin_average", .*, got \'{name}\''):
            mislabelled_share(dynamics, by=name)
    with pytest.raises(ValueError, match=r"by: expected shape \[3\]"):
        mislabelled_share(dynamics, by=torch.zeros(2))
