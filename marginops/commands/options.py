"""Shared parts of the commands that train a network: options, checks, data, network, files."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import ClassificationData, DataError, load_digits, load_fashion_mnist

MOMENTUM = 0.9
Defaults = Mapping[str, Mapping[str, Any]]
"""The default values that depend on the data set, by data set and option."""


class UsageError(Exception):
    """The command cannot run with these options. The message says why and what to do."""


def execute(
    name: str, body: Callable[[argparse.Namespace], None], options: argparse.Namespace
) -> int:
    """Run a command, print an error as one line, and return the exit status."""
    threads = torch.get_num_threads()
    try:
        body(options)
    except (DataError, UsageError) as error:
        print(f"marginops {name}: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def add_data_arguments(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Add ``--data`` and ``--data-dir``."""
    parser.add_argument(
        "--data", choices=defaults, default="digits", help="the data set (default: digits)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        metavar="DIR",
        help="folder with the four Fashion-MNIST files, plain or .gz (default: %(default)s)",
    )


def add_count(
    parser: argparse.ArgumentParser, name: str, help: str, default: int | Defaults
) -> None:
    """Add an option for a positive whole number. Its default may depend on the data set."""
    field = name.removeprefix("--").replace("-", "_")
    shown = default if isinstance(default, int) else _each(default, field)
    parser.add_argument(
        name,
        type=positive(int),
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
        "--hidden",
        type=positive(int),
        nargs="+",
        metavar="N",
        help=f"widths of the hidden layers (default: {_each(defaults, 'hidden')})",
    )
    parser.add_argument(
        "--learning-rate",
        type=positive(float),
        metavar="RATE",
        help=f"{learning_rate} (default: {_each(defaults, 'learning_rate')})",
    )
    parser.add_argument(
        "--device",
        type=_device,
        default=None,
        help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)",
    )
    add_count(parser, "--threads", "CPU threads; more than a few do not help these networks", 1)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help="file of the figure (default: %(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write all results to this file"
    )
    parser.add_argument("--quiet", action="store_true", help=quiet)


def check_environment(options: argparse.Namespace, packages: Sequence[str]) -> None:
    """Check packages, files and device now, so that no error comes after the training."""
    needed = [*packages, *(["sklearn"] if options.data == "digits" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"missing packages: {', '.join(missing)}; install them with: "
            'pip install "marginops[demo]"'
        )
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if options.output.suffix[1:].lower() not in formats:
        raise UsageError(
            f"--output {options.output}: expected a name ending in one of "
            f"{', '.join(f'.{name}' for name in sorted(formats))}"
        )
    for path in filter(None, (options.output, options.json)):
        if not path.parent.is_dir():
            raise UsageError(f"{path}: the folder {path.parent} does not exist; create it first")
    if options.device is not None and options.device.type == "cuda":
        count = torch.cuda.device_count()
        if (options.device.index or 0) >= count:
            raise UsageError(
                f"--device {options.device}: PyTorch finds {count} CUDA devices; try --device cpu"
            )


def with_defaults(options: argparse.Namespace, defaults: Defaults) -> argparse.Namespace:
    """A copy of the options, in which every open option has its default."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return argparse.Namespace(
        **{**vars(options), "device": device, **defaults[options.data], **given}
    )


def load(options: argparse.Namespace) -> ClassificationData:
    """The data set that the options ask for, on the CPU."""
    return load_digits() if options.data == "digits" else load_fashion_mnist(options.data_dir)


def mlp(data: ClassificationData, hidden: Sequence[int]) -> nn.Sequential:
    """A network of linear layers with biases and ReLU, for the inputs and classes of the data."""
    width = data.train_inputs[0].numel()
    layers: list[nn.Module] = [nn.Flatten()]
    for next_width in hidden:
        layers += [nn.Linear(width, next_width), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, data.num_classes))


def describe(data: ClassificationData, options: argparse.Namespace) -> tuple[str, str]:
    """Two texts: the data set with its numbers of samples, and the network with the batch size."""
    layers = [data.train_inputs[0].numel(), *options.hidden, data.num_classes]
    return (
        f"{data.name}: {len(data.train_target):,} training and {len(data.test_target):,} test "
        "samples",
        f"MLP {'-'.join(map(str, layers))}, batch size {options.batch_size}",
    )


def prepare(
    arguments: argparse.Namespace, packages: Sequence[str], defaults: Defaults
) -> tuple[argparse.Namespace, ClassificationData]:
    """Check the environment, fill in the options, and load the data to the device."""
    check_environment(arguments, packages)
    options = with_defaults(arguments, defaults)
    torch.set_num_threads(options.threads)
    return options, load(options).to(options.device)


def write_results(
    options: argparse.Namespace, figure: Any, dpi: int, report: Mapping[str, Any]
) -> None:
    """Write the figure and, where ``--json`` asks for it, the report."""
    _write(options.output, lambda path: figure.savefig(path, dpi=dpi))
    if options.json is not None:
        text = json.dumps(report, indent=2) + "\n"
        _write(options.json, lambda path: path.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file and print its name."""
    try:
        write(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"wrote {path}")


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type for positive finite numbers of type ``kind``."""

    def positive(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a positive {name}, got {text!r}")
        return value

    return positive


def seed(text: str) -> int:
    """An argparse type for the seeds of random numbers."""
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^63, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a device such as cpu or cuda:0, got {text!r}"
        ) from error


def _each(defaults: Defaults, field: str) -> str:
    def shown(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    texts = {name: shown(values[field]) for name, values in defaults.items()}
    if len(set(texts.values())) == 1:
        return texts.popitem()[1]
    return ", ".join(f"{text} for {name}" for name, text in texts.items())
