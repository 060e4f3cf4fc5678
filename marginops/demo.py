"""The ``marginops demo`` command: minimal margin selection against uniform sampling."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .demo_report import LABELS, Results, conclusion, report, table
from .training import (
    ClassificationData,
    DataError,
    Sampling,
    TrainingHistory,
    load_digits,
    load_fashion_mnist,
    train,
)

_MOMENTUM = 0.9


@dataclass(frozen=True)
class _Defaults:
    batch_size: int
    updates: int
    hidden: tuple[int, ...]


_DEFAULTS = {
    "digits": _Defaults(batch_size=16, updates=1000, hidden=(128,)),
    "fashion-mnist": _Defaults(batch_size=64, updates=3000, hidden=(256,)),
}


class _UsageError(Exception):
    """The command cannot run as asked; the message says why and what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``marginops demo`` to its parser."""

    def defaults(field: str) -> str:
        values = (f"{getattr(value, field)} for {name}" for name, value in _DEFAULTS.items())
        return f"(default: {', '.join(values)})"

    parser.add_argument(
        "--data", choices=_DEFAULTS, default="digits", help="what to train on (default: digits)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        metavar="DIR",
        help="folder with the four Fashion-MNIST files, plain or .gz (default: %(default)s)",
    )
    parser.add_argument(
        "--updates",
        type=_positive(int),
        metavar="N",
        help=f"optimizer steps of each run {defaults('updates')}",
    )
    parser.add_argument(
        "--batch-size",
        type=_positive(int),
        metavar="N",
        help=f"samples back-propagated in each update {defaults('batch_size')}",
    )
    parser.add_argument(
        "--candidates",
        type=_positive(int),
        default=10,
        metavar="N",
        help="candidates scored for each sample trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=_positive(int),
        default=3,
        metavar="N",
        help="runs of each method (default: %(default)s)",
    )
    parser.add_argument(
        "--hidden",
        type=_positive(int),
        nargs="+",
        metavar="N",
        help="widths of the hidden layers (default: 128 for digits, 256 for fashion-mnist)",
    )
    parser.add_argument(
        "--learning-rate",
        type=_positive(float),
        default=0.05,
        metavar="RATE",
        help="of SGD with momentum 0.9, falling to 0 along a cosine (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=_device, default=None, help="such as cpu or cuda (default: cuda, else cpu)"
    )
    parser.add_argument(
        "--threads",
        type=_positive(int),
        default=1,
        metavar="N",
        help="CPU threads; the networks are too small to gain from many (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("marginops-demo.png"),
        metavar="FILE",
        help="the figure (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results here, too")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Train with both methods, print the table and write the figure; return the exit status."""
    threads = torch.get_num_threads()
    try:
        _run(arguments)
    except (DataError, _UsageError) as error:
        print(f"marginops demo: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    _check_environment(arguments)
    options = _with_defaults(arguments)
    torch.set_num_threads(options.threads)
    data = _load(options).to(options.device)
    results = compare(data, options)

    layers = [data.train_inputs[0].numel(), *options.hidden, data.num_classes]
    setting = f"MLP {'-'.join(map(str, layers))}, batch size {options.batch_size}"
    print(
        f"{data.name}: {len(data.train_target):,} training and {len(data.test_target):,} test "
        f"samples; {setting}, seeds: {options.seeds}, device: {options.device}"
    )
    print(f"\n{table(results)}\n\n{conclusion(results, options.candidates)}")

    from .demo_figure import draw

    figure = draw(results, f"{data.name}, {setting}, {options.updates:,} updates")
    _write(options.output, lambda path: figure.savefig(path, dpi=150))
    if options.json is not None:
        text = json.dumps(report(results, options), indent=2)
        _write(options.json, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def compare(data: ClassificationData, options: argparse.Namespace) -> Results:
    """Train with either sampling from the same initial networks, one per seed."""
    from tqdm import tqdm

    def network(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return _mlp(data.train_inputs[0].numel(), options.hidden, data.num_classes).to(
            options.device
        )

    def run_once(sampling: Sampling, seed: int, updates: int, progress: Any) -> TrainingHistory:
        model = network(seed)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=options.learning_rate, momentum=_MOMENTUM
        )
        return train(
            model,
            data,
            optimizer,
            updates=updates,
            batch_size=options.batch_size,
            sampling=sampling,
            candidate_ratio=options.candidates,
            scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates),
            generator=torch.Generator().manual_seed(seed),
            log_norm=_log_norm,
            on_update=lambda _: progress.update(),
        )

    # The first calls build or load the native library and warm up PyTorch: no run pays for that.
    for sampling in LABELS:
        run_once(sampling, 0, min(options.updates, 20), tqdm(disable=True))
    results: dict[Sampling, list[TrainingHistory]] = {sampling: [] for sampling in LABELS}
    total = len(LABELS) * options.seeds * options.updates
    with tqdm(total=total, unit=" updates", disable=options.quiet, dynamic_ncols=True) as progress:
        for seed in range(options.seeds):
            for sampling in LABELS:
                progress.set_description(f"seed {seed + 1}/{options.seeds}, {LABELS[sampling]}")
                history = run_once(sampling, seed, options.updates, progress)
                if not history.margins_after.isfinite().all():
                    raise _UsageError(
                        f"training diverged ({LABELS[sampling]}, seed {seed + 1}); "
                        "lower --learning-rate"
                    )
                results[sampling].append(history)
    return results


def _check_environment(arguments: argparse.Namespace) -> None:
    """Fail before the training rather than after it."""
    needed = ["matplotlib", "tqdm", *(["sklearn"] if arguments.data == "digits" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise _UsageError(
            f'{", ".join(missing)} not installed; install with: pip install "marginops[demo]"'
        )
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    if arguments.output.suffix[1:].lower() not in formats:
        raise _UsageError(
            f"--output {arguments.output}: expected a name ending in one of "
            f"{', '.join(f'.{name}' for name in sorted(formats))}"
        )
    for path in filter(None, (arguments.output, arguments.json)):
        if not path.parent.is_dir():
            raise _UsageError(f"{path}: the folder {path.parent} does not exist; create it first")
    if arguments.device is not None and arguments.device.type == "cuda":
        count = torch.cuda.device_count()
        if (arguments.device.index or 0) >= count:
            raise _UsageError(
                f"--device {arguments.device}: PyTorch sees {count} CUDA devices; try --device cpu"
            )


def _with_defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    options = argparse.Namespace(**vars(arguments))
    for name, value in vars(_DEFAULTS[options.data]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device is None:
        options.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return options


def _load(options: argparse.Namespace) -> ClassificationData:
    data = load_digits() if options.data == "digits" else load_fashion_mnist(options.data_dir)
    candidates = options.batch_size * options.candidates
    if candidates > len(data.train_target):
        raise _UsageError(
            f"--batch-size {options.batch_size} times --candidates {options.candidates} is "
            f"{candidates}, more than the {len(data.train_target)} training samples; lower either"
        )
    return data


def _mlp(inputs: int, hidden: Sequence[int], classes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def _log_norm(network: nn.Module) -> Tensor:
    """Logarithm of the product of the layers' Frobenius norms; the network has only linear ones."""
    norms = [layer.weight.norm() for layer in network.modules() if isinstance(layer, nn.Linear)]
    return torch.stack(norms).log().sum()


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        write(path)
    except OSError as error:
        raise _UsageError(f"{path}: cannot be written: {error.strerror}") from error
    print(f"wrote {path}")


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
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


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"expected a device such as cpu or cuda:0, got {text!r}"
        ) from error
