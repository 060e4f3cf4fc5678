"""Matplotlib for figures in files: without a display, a backend or the settings of the user."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FigureError(Exception):
    """Matplotlib cannot draw a figure here. The message says why."""


def load() -> None:
    """Import matplotlib. Call this before anything else imports it, as torchmetrics does.

    ``MPLBACKEND`` may name a module that is not installed, as in the environment of a notebook, and
    a matplotlibrc may be damaged. Neither is read.
    """
    # What it logs concerns the settings, the fonts and the cache of the user.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    with _variables(MPLBACKEND="agg", MATPLOTLIBRC=os.devnull):
        try:
            import_module("matplotlib.figure")
        except Exception as error:
            raise FigureError(f"matplotlib cannot be imported: {_one_line(error)}") from error


def formats() -> list[str]:
    """The formats of a figure, which are also the endings of its file."""
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())


def check(format: str) -> None:
    """Draw a figure of one letter. Some formats need programs that may be missing."""
    from matplotlib.figure import Figure

    def letter() -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0, "a")
        return figure

    try:
        render(letter, format, 50)
    except Exception as error:
        raise FigureError(
            f"matplotlib cannot draw .{format} here: {_one_line(error)}; try .png"
        ) from error


def render(draw: Callable[[], Figure], format: str, dpi: int) -> bytes:
    """Draw a figure with matplotlib's default settings, and return the content of its file."""
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        draw().savefig(content, format=format, dpi=dpi)
    return content.getvalue()


@contextmanager
def _variables(**variables: str) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
