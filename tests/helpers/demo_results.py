"""Histories of training runs that are made up, for the report and the figure of the demo."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from marginops.commands.demo.loop import Sampling, TrainingHistory
from marginops.commands.demo.report import Results


def history(
    sampling: Sampling, updates: int, accuracy: Sequence[float], seconds: float
) -> TrainingHistory:
    """A run with evaluations at equal distances."""
    generator = torch.Generator().manual_seed(0)
    last = len(accuracy) - 1
    return TrainingHistory(
        sampling=sampling,
        updates=tuple(updates * i // last for i in range(last + 1)),
        seconds=tuple(seconds * i / last for i in range(last + 1)),
        test_accuracy=tuple(accuracy),
        samples_trained=16 * updates,
        samples_scored=160 * updates if sampling == "minimal_margin" else 0,
        margins_before=torch.randn(200, generator=generator),
        margins_after=torch.randn(200, generator=generator) + 5,
    )


def results(
    uniform: Sequence[float],
    stale: Sequence[float],
    minimal: Sequence[float],
    minimal_seconds: float = 6.0,
) -> Results:
    """Runs that end with the given accuracies, one for each seed, after 100 updates.

    Those of 50 updates take half the time and end 0.02 below. Uniform runs take 2 s and runs of
    stale margins 2.2 s.
    """
    given: list[tuple[Sampling, Sequence[float], float]] = [
        ("uniform", uniform, 2.0),
        ("stale_margin", stale, 2.2),
        ("minimal_margin", minimal, minimal_seconds),
    ]
    return {
        sampling: {
            updates: [
                history(sampling, updates, (0.1, end - less - 0.1, end - less), time)
                for end in accuracies
            ]
            for updates, less, time in ((50, 0.02, seconds / 2), (100, 0.0, seconds))
        }
        for sampling, accuracies, seconds in given
    }
