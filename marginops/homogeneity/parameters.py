"""The parameters of a network with their rates, and the sums of their squares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _advice as advice
from .. import _checks as checks
from ..networks import unwrap

Parameters = nn.Module | Mapping[str, Tensor]
# In this range, the sum of a billion squares neither underflows nor overflows in float64.
_SAFE = 1e-140, 1e140


def check_ordinary(argument: str, name: str, value: Tensor) -> None:
    """Check that a parameter is a dense tensor whose elements are all here."""
    if nn.parameter.is_lazy(value):
        raise ValueError(
            f"{argument}: expected {name!r} to be initialized, got a parameter of a lazy module "
            "before its first input"
        )
    if checks.is_distributed(value):
        raise TypeError(
            f"{argument}: expected an ordinary tensor for {name!r}, got a DTensor; "
            f"{advice.GATHERED}"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{argument}: expected a dense (strided) tensor for {name!r}, got layout {value.layout}"
        )
    if checks.wraps_tensors(value):
        raise TypeError(
            f"{argument}: expected an ordinary tensor for {name!r}, got {type(value).__name__}; "
            f"{advice.UNQUANTIZED}"
        )


class Groups(NamedTuple):
    """The parameters grouped by rate, in float64.

    Attributes:
        rate: ``[G]``, the distinct rates in ascending order.
        squares: ``[G]``, for each rate the sum of the squares of its parameters divided by
            ``unit``.
        unit: ``[G]``, 1 unless the squares of the parameters exceed the range of float64.
    """

    rate: Tensor
    squares: Tensor
    unit: Tensor


def groups_of(parameters: Any, rates: Any, largest_only: bool = False) -> Groups:
    """Check the arguments, and group the parameters. Those with rate 0 do not count.

    With ``largest_only``, only the parameters with the largest rate count.
    """
    rated = rated_parameters(parameters, rates)
    device = rated[0][0].device
    largest = max(rate for _, rate in rated)
    groups: dict[float, list[Tensor]] = {largest: []}
    for value, rate in rated:
        if rate > 0 and (rate == largest or not largest_only):
            groups.setdefault(rate, []).append(value)
    ordered = sorted(groups)
    units = [_unit(groups[rate], device) for rate in ordered]
    squares = [
        sum(
            (
                (value.to(torch.float64) / unit.to(value.device)).square().sum().to(device)
                for value in groups[rate]
            ),
            torch.zeros_like(unit),
        )
        for rate, unit in zip(ordered, units, strict=True)
    ]
    distinct = torch.tensor(ordered, dtype=torch.float64, device=device)
    return Groups(distinct, torch.stack(squares), torch.stack(units))


def _unit(values: list[Tensor], device: torch.device) -> Tensor:
    """The largest magnitude if its square exceeds float64, else 1, also for NaN and infinity."""
    one = torch.ones((), dtype=torch.float64, device=device)
    peaks = [
        value.detach().abs().amax().to(device)
        for value in values
        if value.dtype == torch.float64 and value.numel() > 0
    ]
    if not peaks:
        return one
    peak = torch.stack(peaks).amax()
    is_safe = (peak >= _SAFE[0]) & (peak <= _SAFE[1])
    return torch.where(is_safe | (peak == 0) | ~peak.isfinite(), one, peak)


def rated_parameters(parameters: Any, rates: Any) -> list[tuple[Tensor, float]]:
    """Check the arguments, and return every parameter with its rate."""
    if isinstance(parameters, nn.Module):
        parameters = dict(unwrap(parameters).named_parameters())
    if not isinstance(parameters, Mapping):
        raise TypeError(
            "parameters: expected a torch.nn.Module or a mapping of names to tensors, "
            f"got {type(parameters).__name__}"
        )
    if not isinstance(rates, Mapping):
        raise TypeError(f"rates: expected a mapping of names, got {type(rates).__name__}")
    if missing := [name for name in parameters if name not in rates]:
        raise ValueError(f"rates: expected a rate for every parameter, got none for {missing}")
    if unknown := [name for name in rates if name not in parameters]:
        raise ValueError(f"rates: expected only names of parameters, got {unknown}")
    if not parameters:
        raise ValueError("parameters: expected at least one, got none")
    for name, value in parameters.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"parameters: expected a tensor for {name!r}, got {type(value).__name__}"
            )
        check_ordinary("parameters", name, value)
        if value.dtype not in checks.FLOATING:
            raise TypeError(
                f"parameters: expected a floating-point dtype for {name!r}, got {value.dtype}"
            )
        rate = rates[name]
        if isinstance(rate, bool) or not isinstance(rate, (int, float)):
            raise TypeError(f"rates: expected a number for {name!r}, got {type(rate).__name__}")
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"rates: expected a finite rate >= 0 for {name!r}, got {rate}")
    return [(value, float(rates[name])) for name, value in parameters.items()]
