"""Calls every op that has kernels, on inputs that take the kernels' different ways.

``python -m helpers.emulation.every_op`` does so in one or several orders of threads, and fails if
the bytes of a result depend on the order. ``--help`` shows how to choose. It needs the environment
of :func:`helpers.emulation.harness.environment`.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import marginops.training  # noqa: F401 - defines its op
from marginops._checks import result_dtype

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "misaligned", "padded", "every_other", "column_major")
VALUES = ("normal", "ties", "infinite", "nan", "huge", "extreme", "ascending")
IGNORE = -100
# Rows, classes and features around the sizes at which launchers choose another way. Many rows have
# a table of distances, moments of larger parts, and a selection by several blocks.
SHAPES = [
    (3, 2, 20),
    (33, 5, 1),
    (300, 9, 64),
    (130, 16, 7),
    (40, 32, 33),
    (15, 65, 3),
    (5, 129, 130),
    (70, 12, 513),
    (7, 257, 8),
    (2, 1025, 20),
    (1, 4099, 64),
    (1, 9001, 5),
    (6, 4, 4104),
    (4500, 2, 4),
    (16400, 40, 9),
]
# Seeds of cases that run nearly every line of device code; none has a thousand classes.
FEW = (15, 17, 19, 24, 31, 35, 51, 54, 55, 57)


@dataclass(frozen=True)
class Case:
    """What the arguments of one call of each op are made from."""

    rows: int
    classes: int
    features: int
    dtype: torch.dtype
    layout: str
    values: str
    seed: int


def cases(few: bool = False) -> Iterator[Case]:
    """Every shape with every dtype, layouts and values in turn; or the few of ``FEW``."""
    for seed, (shape, dtype) in enumerate(itertools.product(SHAPES, DTYPES)):
        case = Case(*shape, dtype, LAYOUTS[seed % 5], VALUES[seed % 7], seed)
        if not few or seed in FEW:
            yield case


def ops() -> dict[str, torch._ops.OpOverload]:
    """The ops that the library in place of the CPU's has kernels for."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    prefix = "marginops_kernels::"
    names = sorted(name.removeprefix(prefix) for name in registered if name.startswith(prefix))
    return {name: getattr(torch.ops.marginops_kernels, name).default for name in names}


def arguments(op: torch._ops.OpOverload, case: Case) -> dict[str, Any]:
    """The arguments of one call, by name. About two of three optional ones are given."""
    values = _values(case)
    generator = torch.Generator().manual_seed(case.seed)
    chosen = {}
    for argument in op._schema.arguments:
        coin = torch.rand((), generator=generator).item()
        optional = isinstance(argument.type, torch.OptionalType)
        if isinstance(argument.type, torch.BoolType):
            chosen[argument.name] = coin < 0.5
        elif optional and coin < 0.35:
            chosen[argument.name] = None
        else:
            name = f"{argument.name}?" if optional else argument.name
            if name not in values:
                raise KeyError(f"{op}: say in {__name__}._values what {name} is")
            chosen[argument.name] = values[name]
    return chosen


def _values(case: Case) -> dict[str, Any]:
    """A value for each argument that ops have; optional arguments have a ``?`` behind the name."""
    rows, classes, dtype = case.rows, case.classes, case.dtype
    generator = torch.Generator().manual_seed(case.seed)
    result = result_dtype(dtype)
    head = result if case.seed % 3 == 0 else dtype

    def numbers(*shape: int, of: torch.dtype = result, values: str = "normal") -> Tensor:
        return laid_out(filled(shape, of, values, generator), case.layout)

    def below(limit: int, *shape: int) -> Tensor:
        return laid_out(torch.randint(limit, shape, generator=generator), case.layout)

    target = below(classes, rows)
    target[torch.rand(rows, generator=generator) < 0.2] = IGNORE
    logits = numbers(rows, classes, of=dtype, values=case.values)
    weight = numbers(classes, case.features, of=head, values=VALUES[case.seed % 5])
    size = (0, 1, 31, 257, 600)[case.seed % 5]
    # Labels are sorted as numbers of 1, 2 or 4 bytes.
    many = 33_000 // case.features if case.layout == "contiguous" else 0
    names = ("grad_margin", "grad_loss", "grad_confidence", "grad_entropy", "input_norm")
    return {
        "logits": logits,
        "target": target,
        "input": numbers(rows, case.features, of=dtype, values=case.values),
        "weight": weight,
        "weight?": weight,
        "bias?": numbers(classes, of=head),
        "rows?": below(rows, rows),
        "rows": numbers(classes, case.features, of=head),
        "scores": logits.flatten()[:20_000],
        "k": rows // 2 + 1,
        "key": below(classes**2, size).sort().values,
        "coefficient": numbers(size),
        "pair": below(classes, 40, 2),
        "rival": below(classes, rows),
        "maximum": logits.to(result).amax(1),
        **{name: numbers(rows).abs() for name in ("confidence", "entropy", "log_sum")},
        **{f"{name}?": numbers(rows) for name in names},
        "log_norm?": torch.tensor(3.5 - case.seed, dtype=result),
        "grad_mean_loss?": torch.tensor(0.75, dtype=result),
        "num_counted?": torch.tensor(float(rows), dtype=result),
        **_dynamics(case, numbers, below),
        "ignore_index": IGNORE,
        "classes": classes,
        "num_classes": max(classes, many),
    }


def _dynamics(
    case: Case, numbers: Callable[..., Tensor], below: Callable[..., Tensor]
) -> dict[str, Any]:
    """The arguments of update_dynamics: samples with a past, and rows that repeat some of them."""
    samples = case.classes
    names = ("margin", "score", "loss", "el2n")
    past = torch.arange(4 * samples, dtype=torch.int32).view(samples, 4) % 3
    return {
        "values": torch.arange(8.0 * samples).view(samples, 8),
        "counts": past,
        "last_seen": torch.where(past[:, 0] == 0, -1, past[:, 0].long() << 32),
        "totals": torch.tensor([5, 0]),
        "indices": below(samples, case.rows),
        **{name: numbers(case.rows, values=case.values) for name in names},
        "correct": below(2, case.rows) == 1,
        "counted": below(4, case.rows) > 0,
        "decay": 0.75,
    }


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout: poison between them, nothing behind them."""
    if values.dim() == 1:
        step, offset = {"contiguous": (1, 0), "misaligned": (1, 1)}.get(layout, (2, 3))
        strides: tuple[int, ...] = (step,)
    else:
        rows, columns = values.shape
        strides, offset = {
            "contiguous": ((columns, 1), 0),
            "misaligned": ((columns, 1), 1),
            "padded": ((columns + 3, 1), 5),
            "every_other": ((2 * columns + 1, 2), 1),
            "column_major": ((1, rows), 0),
        }[layout]
    reach = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    size = offset + reach + 1 if values.numel() else 0
    poison = torch.nan if values.dtype.is_floating_point else torch.iinfo(values.dtype).max
    buffer = torch.full((size,), poison, dtype=values.dtype)
    return buffer.as_strided(values.shape, strides, offset if size else 0).copy_(values)


def filled(
    shape: tuple[int, ...], dtype: torch.dtype, values: str, generator: torch.Generator
) -> Tensor:
    """Random numbers of one of the kinds of ``VALUES``."""
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    coin = torch.rand(shape, generator=generator)
    if values == "ties":
        normal = (normal * 1.5).round()
    elif values == "infinite":
        normal = torch.where(coin < 0.1, torch.inf, torch.where(coin < 0.4, -torch.inf, normal))
    elif values == "nan":
        normal = torch.where(coin < 0.5 / shape[-1], normal.sign() * torch.nan, normal)
    elif values == "huge":  # their squares overflow, their differences do not
        normal *= torch.finfo(dtype).max / 1e8
    elif values == "extreme":
        normal = normal.sign() * torch.finfo(dtype).max * (1 - coin.double() / 4)
    elif values == "ascending":
        normal = normal.sort(-1).values
    return normal.to(dtype)


def results_of(op: torch._ops.OpOverload, values: list[Any]) -> list[bytes]:
    """The bytes of the results, or of copies of the arguments that the op changes."""
    changes = [argument.is_write for argument in op._schema.arguments]
    copies = [
        value.clone() if is_changed else value
        for value, is_changed in zip(values, changes, strict=True)
    ]
    results = op(*copies)
    if results is None:
        results = list(itertools.compress(copies, changes))
    tensors = (results,) if isinstance(results, Tensor) else results
    return [tensor.flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", nargs="+", default=["forward"])
    parser.add_argument("--multiprocessors", nargs="+", type=int, default=[132, 2])
    parser.add_argument("--few", action="store_true", help="cases for a slow sanitizer")
    parser.add_argument("--seed", type=int, help="only this case")
    parser.add_argument("--op", help="only this op")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.ops.load_library(os.environ["MARGINOPS_TEST_LIBRARY"])
    chosen = [
        (case, name, op)
        for case, (name, op) in itertools.product(cases(options.few), ops().items())
        if options.seed in (None, case.seed) and options.op in (None, name)
    ]
    if not chosen:
        sys.exit("no op has kernels, or none is chosen")
    for case, name, op in chosen:
        values = list(arguments(op, case).values())
        for count in options.multiprocessors:
            # Launches read both variables. A sanitizer's report comes below this line.
            print(f"{name} on {count} multiprocessors, {case}", file=sys.stderr, flush=True)
            os.environ["CUDACPU_MULTIPROCESSORS"] = str(count)
            results = {}
            for order in options.orders:
                os.environ["CUDACPU_ORDER"] = order
                results[order] = results_of(op, values)
            if any(other != results[options.orders[0]] for other in results.values()):
                sys.exit("the result depends on the order of threads")


if __name__ == "__main__":
    main()
