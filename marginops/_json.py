"""JSON for files: equal values give equal bytes."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_bytes(value: Any) -> bytes:
    """A value as JSON in ASCII. ``null`` replaces NaN and infinities, which JSON cannot hold."""
    return (json.dumps(_finite(value), indent=2, allow_nan=False) + "\n").encode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
