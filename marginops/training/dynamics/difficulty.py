"""Which number of a sample a policy goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks as checks

if TYPE_CHECKING:
    from .training_dynamics import TrainingDynamics

By = str | Tensor | Callable[["TrainingDynamics"], Tensor]

_SMALL_IS_HARD = ("margin", "margin_average", "aum", "score", "confidence", "correctness")
_LARGE_IS_HARD = ("loss", "el2n", "variability", "forgetting")


def check_by(name: str, by: Any) -> None:
    """Check what a policy goes by, as far as that is possible without dynamics."""
    if isinstance(by, str):
        known = _SMALL_IS_HARD + _LARGE_IS_HARD
        if by not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {by!r}")
    elif isinstance(by, Tensor):
        checks.check_tensor(name, by, 1, "[N]")
    elif not callable(by):
        raise TypeError(
            f"{name}: expected a name, a tensor [N] or a function of the dynamics, "
            f"got {type(by).__name__}"
        )


def difficulty(name: str, by: By, dynamics: TrainingDynamics) -> Tensor:
    """``[N]`` numbers, the smaller the harder; NaN where there is no finite number.

    Small margins, scores, confidences and shares of correct visits are hard, and so are large
    losses, EL2N, variabilities and numbers of forgetting events. A tensor or the result of a
    function is taken as it is, except for samples that were never seen.
    """
    if isinstance(by, str):
        values = getattr(dynamics, by)
        if by in _LARGE_IS_HARD:
            values = -values
    else:
        values = by if isinstance(by, Tensor) else by(dynamics)
        checks.check_tensor(name, values, 1, "[N]")
        if len(values) != dynamics.num_samples:
            raise ValueError(
                f"{name}: expected shape [{dynamics.num_samples}], one number for each sample, "
                f"got {list(values.shape)}"
            )
        values = values.detach().to(dynamics.device)
    # Logits that are not finite are a fault, not a difficult sample.
    values = values.float()
    return torch.where((dynamics.last_step < 0) | ~values.isfinite(), torch.nan, values)
