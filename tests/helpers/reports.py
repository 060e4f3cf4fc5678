"""The comparison of two reports of an epoch."""

import dataclasses

import torch

from marginops.training import EpochReport


def assert_reports_close(one: EpochReport, other: EpochReport) -> None:
    """Compare all numbers, up to rounding in another order of summation."""
    for field in dataclasses.fields(EpochReport):
        values = getattr(one, field.name), getattr(other, field.name)
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5, equal_nan=True)
