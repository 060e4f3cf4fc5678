"""What a reader sees of a sample: a thumbnail or a piece of text, from a function of the user."""

from __future__ import annotations

import base64
import html
import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..options import UsageError

_MOST_TEXT = 160
_LARGEST_SIDE = 64

Samples = Callable[[int], Any]


def find_function(name: str) -> Samples:
    """Import ``package.module:function``. The current folder is searched first."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise UsageError(f"--samples: expected package.module:function, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        raise UsageError(
            f"--samples: expected a function that can be imported, got {name!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not callable(found):
        raise UsageError(f"--samples: expected a function, got the {type(found).__name__} {name}")
    result: Samples = found
    return result


def preview(samples: Samples, index: int) -> str:
    """A piece of HTML that shows a sample. It is safe whatever the function returns."""
    try:
        value = samples(index)
        if isinstance(value, str):
            words = " ".join(value.split())
            cut = words if len(words) <= _MOST_TEXT else f"{words[: _MOST_TEXT - 1]}…"
            return f'<span class="text">{html.escape(cut)}</span>'
        return f'<img alt="" src="data:image/png;base64,{_png(value)}">'
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--samples: the function failed for the index {index} "
            f"({type(error).__name__}: {error})"
        ) from error


def _png(value: Any) -> str:
    """A picture as PNG in base64, at most 64 pixels wide and high."""
    from PIL import Image

    pixels = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[2] not in (1, 3):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    is_picture = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not is_picture or pixels.size == 0 or pixels.dtype.kind not in "uifb":
        raise UsageError(
            "--samples: expected a str, or an array [H, W], [H, W, 3] or [3, H, W] of numbers, got "
            f"{type(value).__name__} of shape {list(pixels.shape)}"
        )
    if pixels.dtype != np.uint8:
        # Pixels that are standardised or in [0, 1] fill the whole range of greys.
        pixels = np.nan_to_num(pixels.astype(np.float64), posinf=0, neginf=0)
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) / ((high - low) or 1) * 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return base64.b64encode(content.getvalue()).decode("ascii")
