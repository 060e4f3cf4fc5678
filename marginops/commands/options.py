"""Options that the commands which train a network share, and the types of their values."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

MOMENTUM = 0.9
DATA_SETS = ("digits", "fashion-mnist")
Defaults = Mapping[str, Mapping[str, Any]]
"""The default values of options for ``"digits"``, and for any ``"other"`` data set."""

# package.module:function, also a method or a class.
_PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# The largest whole number that torch takes.
_LARGEST = 2**63 - 1
# The largest float32, the type of the networks.
_LARGEST_RATE = torch.finfo(torch.float32).max


class UsageError(Exception):
    """The command cannot run with these options. The message says why and what to do."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and ``--data-dir``."""
    parser.add_argument(
        "--data",
        type=_data,
        default="digits",
        metavar="DATA",
        help="digits, fashion-mnist, or MODULE:FUNCTION, a function of yours that returns the "
        "training inputs and labels and the test inputs and labels (default: digits)",
    )
    parser.add_argument(
        "--data-dir",
        type=path,
        metavar="DIR",
        help="folder with the four Fashion-MNIST files, plain or .gz (default: the folder of the "
        "Debian package dataset-fashion-mnist if there is one, or else the cache, to which the "
        "files are downloaded)",
    )


def add_count(
    parser: argparse.ArgumentParser,
    name: str,
    help: str,
    default: int | Defaults,
    highest: int = _LARGEST,
) -> None:
    """Add an option for a positive whole number. Its default may depend on the data set."""
    field = name.removeprefix("--").replace("-", "_")
    shown = default if isinstance(default, int) else _each(default, field)
    parser.add_argument(
        name,
        type=whole_number(1, highest),
        default=default if isinstance(default, int) else None,
        metavar="N",
        help=f"{help} (default: {shown})",
    )


def add_run_arguments(
    parser: argparse.ArgumentParser, defaults: Defaults, learning_rate: str, output: str, quiet: str
) -> None:
    """Add the options of network, optimizer, device and files.

    Args:
        parser: The parser of the command.
        defaults: The defaults of ``hidden`` and ``learning_rate`` for each data set.
        learning_rate: The help text of ``--learning-rate``.
        output: The default file of the figure.
        quiet: The help text of ``--quiet``.
    """
    parser.add_argument(
        "--model",
        type=place,
        metavar="MODULE:FUNCTION",
        help="a function of yours that returns the network, called with num_classes=C (default: "
        "an MLP)",
    )
    parser.add_argument(
        "--hidden",
        type=whole_number(1),
        nargs="+",
        metavar="N",
        help=f"widths of the hidden layers of the MLP (default: {_each(defaults, 'hidden')})",
    )
    parser.add_argument(
        "--learning-rate",
        type=_learning_rate,
        metavar="RATE",
        help=f"{learning_rate} (default: {_each(defaults, 'learning_rate')})",
    )
    parser.add_argument(
        "--device",
        type=device,
        default=None,
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    add_count(
        parser,
        "--threads",
        "CPU threads; more than a few do not help these networks",
        1,
        highest=os.cpu_count() or 1,
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path(output),
        metavar="FILE",
        help="file of the figure (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=path, metavar="FILE", help="also write all results to this file"
    )
    parser.add_argument("--quiet", action="store_true", help=quiet)


def with_defaults(options: argparse.Namespace, defaults: Defaults) -> argparse.Namespace:
    """A copy of the options, in which every open option has its default."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = defaults["digits" if options.data == "digits" else "other"]
    return argparse.Namespace(**{**vars(options), "device": device, **chosen, **given})


def whole_number(lowest: int, highest: int = _LARGEST) -> Callable[[str], int]:
    """An argparse type for whole numbers in a range."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise _refusal(f"a whole number of at least {lowest}", text)
        if value > highest:
            raise _refusal(f"a whole number of at most {highest}", text)
        return value

    return whole_number


def is_place(text: str) -> bool:
    """Whether a text has the form ``package.module:function``."""
    return _PLACE.fullmatch(text) is not None


def path(text: str) -> Path:
    """An argparse type for the path of a file or folder."""
    if not text or "\0" in text:
        raise _refusal("a path", text)
    return Path(text)


def text(text: str) -> str:
    """An argparse type for a text that is not empty."""
    if not text or "\0" in text:
        raise _refusal("a text", text)
    return text


def share(text: str) -> float:
    """An argparse type for a share that leaves something: at least 0, below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise _refusal("a number of at least 0 and below 1", text)
    return value


def _data(text: str) -> str:
    if text not in DATA_SETS and not is_place(text):
        raise _refusal(f"a data set: {', '.join(DATA_SETS)} or MODULE:FUNCTION", text)
    return text


def place(text: str) -> str:
    """An argparse type for a function as ``package.module:function``."""
    if not is_place(text):
        raise _refusal("a function as MODULE:FUNCTION", text)
    return text


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LARGEST_RATE:
        raise _refusal("a positive number that float32 can hold", text)
    return value


def device(text: str) -> torch.device:
    """An argparse type for a device."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise _refusal("a device: cpu, cuda or cuda:N", text)
    return device


def _refusal(expected: str, text: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return argparse.ArgumentTypeError(f"expected {expected}, got {shown!r}")


def _each(defaults: Defaults, field: str) -> str:
    def shown(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    digits, other = (shown(defaults[data][field]) for data in ("digits", "other"))
    return other if digits == other else f"{digits} for digits, else {other}"
