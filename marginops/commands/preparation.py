"""What the commands that train a network do before the training and after it."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from .._json import json_bytes
from . import console, fashion_mnist, figures, output
from .data import ClassificationData, DataError, load_digits, load_fashion_mnist
from .functions import is_out_of_memory
from .models import widths
from .options import Defaults, UsageError, with_defaults
from .own_data import load_own

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Weights, gradients and momentum, in float32.
_BYTES_A_PARAMETER = 12


def execute(
    name: str, body: Callable[[argparse.Namespace], int], options: argparse.Namespace
) -> int:
    """Run a command, print an error as one line, and return the exit status."""
    threads = torch.get_num_threads()
    try:
        return body(options)
    except (DataError, UsageError) as error:
        console.fail(f"marginops {name}: {error}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "memory is full"
        lower = "--batch-size" if options.model else "--hidden or --batch-size"
        console.fail(
            f"marginops {name}: the training needs more memory than there is ({reason}); "
            f"lower {lower}"
        )
        return 1
    finally:
        torch.set_num_threads(threads)


def prepare(
    arguments: argparse.Namespace, packages: Sequence[str], defaults: Defaults
) -> tuple[argparse.Namespace, ClassificationData]:
    """Check the environment, fill in the options, and load the data to the device.

    Whatever can be noticed before the training is noticed here.
    """
    digits = ["sklearn"] if arguments.data == "digits" else []
    check_packages(list(dict.fromkeys([*packages, *digits])), "demo")
    _check_files(arguments)
    options = with_defaults(arguments, defaults)
    check_device(options.device)
    torch.set_num_threads(options.threads)
    if arguments.model is not None and arguments.hidden is not None:
        raise UsageError(
            f"--hidden: expected no widths of layers with --model {arguments.model}, got "
            f"{' '.join(map(str, arguments.hidden))}"
        )
    data = _load(options)
    if options.model is None:
        _check_built_in(data, options)
    return options, data.to(options.device)


def describe(data: ClassificationData, options: argparse.Namespace) -> tuple[str, str]:
    """Two texts: the data set with its numbers of samples, and the network with the batch size."""
    network = options.model or f"MLP {'-'.join(map(str, widths(data, options.hidden)))}"
    return (
        f"{data.name}: {len(data.train_target):,} training and {len(data.test_target):,} test "
        "samples",
        f"{network}, batch size {options.batch_size}",
    )


def finish(
    name: str,
    options: argparse.Namespace,
    text: str,
    report: Mapping[str, Any],
    draw: Callable[[], Figure],
    dpi: int,
) -> int:
    """Print the text, write the report and the figure, and return the exit status.

    Each result is written whatever becomes of the others.
    """
    results: list[tuple[str, Any, Callable[[], bytes]]] = [
        ("--output", options.output, lambda: figures.render(draw, _format(options.output), dpi))
    ]
    if options.json is not None:
        results.insert(0, ("--json", options.json, lambda: json_bytes(report)))
    written, failed = [], []
    for option, path, content in results:
        try:
            output.write(path, content())
            written.append(f"wrote {path}")
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            failed.append(f"marginops {name}: {option}: {path} cannot be written: {reason}")
    for line in failed:
        console.fail(line)
    console.say("\n".join([text, *written]))
    return 1 if failed else 0


def _load(options: argparse.Namespace) -> ClassificationData:
    if options.data != "fashion-mnist" and options.data_dir is not None:
        raise UsageError(
            f"--data-dir: expected no folder for {options.data}, got {options.data_dir}; add "
            "--data fashion-mnist"
        )
    if options.data == "digits":
        return load_digits()
    if options.data == "fashion-mnist":
        folder = options.data_dir or fashion_mnist.find_folder(quiet=options.quiet)
        return load_fashion_mnist(folder)
    return load_own(options.data)


def check_packages(names: Sequence[str], extra: str) -> None:
    """Check that packages are installed, which the extra ``extra`` of marginops brings."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"missing packages: {', '.join(missing)}; install them with: "
            f'pip install "marginops[{extra}]"'
        )


def _check_files(options: argparse.Namespace) -> None:
    named = [("--output", options.output)]
    if options.json is not None:
        named.append(("--json", options.json))
    for option, path in named:
        try:
            output.check(path)
        except output.OutputError as error:
            raise UsageError(f"{option}: {error}") from error
    if (
        options.json is not None
        and output.is_same(options.output, options.json)
        and not output.is_special(options.output)
    ):
        raise UsageError(
            f"--json: expected another file than that of --output, got {options.json} for both"
        )
    try:
        figures.load()
        format, known = _format(options.output), figures.formats()
        if format not in known:
            raise UsageError(
                f"--output: expected a name ending in one of "
                f"{', '.join(f'.{name}' for name in known)}, got {options.output}"
            )
        figures.check(format)
    except figures.FigureError as error:
        raise UsageError(f"--output: {error}") from error


def _format(path: Any) -> str:
    """The format of a figure. A device such as /dev/stdout names none and gets a PNG."""
    ending: str = path.suffix[1:].lower()
    return "png" if not ending and output.is_special(path) else ending


def check_device(device: torch.device) -> None:
    """Check that ``--device`` names a device that PyTorch can use."""
    if device.type == "cpu":
        return
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(
            f"--device: expected one of the {count} CUDA devices that PyTorch finds, got {device}; "
            "try --device cpu"
        )
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"--device: {device} cannot be used ({reason}); try --device cpu"
        ) from error


def _check_built_in(data: ClassificationData, options: argparse.Namespace) -> None:
    """Refuse inputs that the MLP does not take, and one that does not fit into memory.

    Without this, Linux may end the process during the training.
    """
    if not data.train_inputs.is_floating_point():
        raise UsageError(
            f"--data: train_inputs: expected floating-point numbers for the MLP, got "
            f"{data.train_inputs.dtype}; pass --model, or convert them"
        )
    needed = _BYTES_A_PARAMETER * sum(
        (before + 1) * after for before, after in itertools.pairwise(widths(data, options.hidden))
    )
    if options.device.type == "cuda":
        _, memory = torch.cuda.mem_get_info(options.device)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UsageError(
            f"--hidden: expected layers whose training fits into the {memory / 1e9:.1f} GB of "
            f"memory, got {' '.join(map(str, options.hidden))}, which needs {needed / 1e9:.1f} GB"
        )
