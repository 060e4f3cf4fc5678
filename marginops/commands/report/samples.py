"""What a reader sees of a sample: a thumbnail or a piece of text, from a function of the user."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..functions import told
from ..options import UsageError

_MOST_TEXT = 160
_LARGEST_SIDE = 64
# The style sheet of the page does not reach into tooltips.
_PICTURE = "display:block;height:56px;image-rendering:pixelated"

Samples = Callable[[int], Any]


def preview(samples: Samples, index: int) -> str:
    """A piece of HTML that shows a sample. It is safe whatever the function returns."""
    with told("--samples", f"the function, for the index {index},"):
        value = samples(index)
    if isinstance(value, str):
        words = " ".join(value.split())
        cut = words if len(words) <= _MOST_TEXT else f"{words[: _MOST_TEXT - 1]}…"
        return f'<span style="display:block;max-width:320px">{html.escape(cut)}</span>'
    return f'<img alt="" style="{_PICTURE}" src="data:image/png;base64,{_png(value)}">'


def _png(value: Any) -> str:
    """A picture as PNG in base64, at most 64 pixels wide and high."""
    from PIL import Image

    with told("--samples", "the conversion of its result"):
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
