"""Checks the state of a RunRecorder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

VERSION = 1


def check(state_dict: Any, num_samples: int, data: str) -> None:
    """Check that a dictionary is a whole state of a recorder of the same data."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    if state_dict.get("version") != VERSION:
        raise ValueError(
            f"state_dict: expected version {VERSION}, got {state_dict.get('version')!r}; "
            "pass the result of RunRecorder.state_dict()"
        )
    own = {"num_samples": num_samples, "data": data}
    forms = {
        "notes": (torch.int64, [num_samples, 2]),
        "count_before": (torch.int32, [num_samples]),
        "margin_before": (torch.float32, [num_samples]),
    }
    expected = {"version", *own, *forms, "step", "epochs"}
    if set(state_dict) != expected:
        raise ValueError(
            f"state_dict: expected the keys {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(map(str, state_dict)))}"
        )
    for name, value in own.items():
        if state_dict[name] != value:
            raise ValueError(
                f"state_dict: expected {name} {value!r}, got {state_dict[name]!r}; load the state "
                "of a run on the same data"
            )
    for name, (dtype, shape) in forms.items():
        value = state_dict[name]
        if not isinstance(value, Tensor) or value.dtype != dtype or list(value.shape) != shape:
            raise ValueError(f"state_dict: expected {name} as a tensor {shape} of {dtype}")
    step = state_dict["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"state_dict: expected step as an int >= 0, got {step!r}")
    notes = state_dict["notes"]
    if not ((notes >= 0) & (notes >> 32 <= step)).all():
        raise ValueError(f"state_dict: expected notes of the steps 0 to {step}, got others")
    _check_epochs(state_dict["epochs"])


def _check_epochs(epochs: Any) -> None:
    try:
        numbers = [json.loads(line)["epoch"] for line in epochs]
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError("state_dict: expected epochs as a list of lines of JSON") from error
    if any(type(number) is not int for number in numbers) or numbers != sorted(set(numbers)):
        raise ValueError(f"state_dict: expected epochs with ascending numbers, got {numbers}")
