"""What people pass by mistake, by the name of the argument, and the errors that they get."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from marginops import Selection

N, C, D = 12, 4, 6


class Mistake(NamedTuple):
    """How to make a wrong argument from a right one, and the error that it gives."""

    change: Callable[[Any], Any]
    error: type[Exception]
    message: str


def _output(value: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=value, loss=None)


_BINARY = r".*; for binary logits .*torch\.stack\(\[-z / 2, z / 2\], -1\), which makes the margin z"
_ORDER = r"expected shape .* got \[12\]; .* check the order of the arguments"
_TENSOR = {
    "numpy": Mistake(lambda v: v.numpy(), TypeError, r".* got ndarray; pass torch\.as_tensor\("),
    "numbers": Mistake(lambda v: v.tolist(), TypeError, r".* got list; pass torch\.as_tensor\("),
    "list": Mistake(lambda v: list(v), TypeError, r".* got list; pass torch\.stack\("),
    "tuple": Mistake(lambda v: (v, 0), TypeError, r".* got tuple; pass the one of its 2 elements"),
    "none": Mistake(lambda _: None, TypeError, r"expected a tensor .*, got NoneType"),
    "sparse": Mistake(
        lambda v: v.to_sparse(), TypeError, r".* got layout .*; pass \w+\.to_dense\("
    ),
    "device": Mistake(
        lambda v: v.to("meta"), ValueError, r"expected device .* got .*; move .* with \.to\("
    ),
}
_FLOAT = {
    "integer": Mistake(
        lambda v: v.long(), TypeError, r"expected dtype .*\.int64; pass \w+\.float\("
    ),
    "complex": Mistake(
        lambda v: v + 0j, TypeError, r"expected dtype .*\.complex64; pass \w+\.real"
    ),
    "nested": Mistake(
        lambda v: torch.nested.nested_tensor(list(v.unbind())),
        TypeError,
        r".* got a nested tensor; pass torch\.cat\(\w+\.unbind\(\)\)",
    ),
}
MISTAKES: dict[str, dict[str, Mistake]] = {
    "logits": _TENSOR
    | _FLOAT
    | {
        "output": Mistake(_output, TypeError, r".* got SimpleNamespace; pass \.logits of this"),
        "mapping": Mistake(lambda v: {"logits": v}, TypeError, r'.* got dict; pass .*\["logits"\]'),
        "layer": Mistake(lambda _: nn.Linear(D, C), TypeError, ".* got Linear; pass the output of"),
        "one column": Mistake(lambda v: v[:, :1], ValueError, r"expected at least 2" + _BINARY),
        "binary": Mistake(lambda v: v[:, 0], ValueError, r"expected shape .* got \[12\]" + _BINARY),
        "sequence": Mistake(
            lambda v: v.unflatten(0, (3, 4)),
            ValueError,
            r"expected shape .* got \[3, 4, 4\]; pass logits\.flatten\(0, -2\), .* target\.flatten",
        ),
        "target": Mistake(lambda _: torch.arange(N) % C, ValueError, _ORDER),
    },
    "input": _TENSOR
    | _FLOAT
    | {
        "images": Mistake(
            lambda v: v.unflatten(1, (2, 3)), ValueError, r".*; pass input\.flatten\(1\) if"
        ),
        "one": Mistake(
            lambda v: v[0], ValueError, r".*; for one sample pass input\.unsqueeze\(0\)"
        ),
        "target": Mistake(lambda _: torch.arange(N) % C, ValueError, _ORDER),
    },
    "weight": {name: value for name, value in _TENSOR.items() if name != "list"}
    | _FLOAT
    | {
        "layer": Mistake(lambda _: nn.Linear(D, C), TypeError, r".* got Linear; pass \.weight of"),
        "network": Mistake(
            lambda _: nn.Sequential(nn.Linear(D, C)), TypeError, r".*; pass \.weight of its last"
        ),
        "quantized": Mistake(
            lambda _: torch.ao.nn.quantized.dynamic.Linear(D, C),
            TypeError,
            r".* got Linear; pass \.weight\(\)\.dequantize\(\) of this layer",
        ),
        "transposed": Mistake(
            lambda v: v.t(), ValueError, r".* got .*\[6, 4\]; pass weight\.t\(\)"
        ),
        "filter": Mistake(
            lambda v: v[:, :, None, None], ValueError, r".*; for a conv.* pass weight\.flatten\(1\)"
        ),
        "target": Mistake(lambda _: torch.arange(N) % C, ValueError, _ORDER),
    },
    "bias": {
        name: value for name, value in _TENSOR.items() if name not in ("list", "none", "sparse")
    }
    | {
        "layer": Mistake(lambda _: nn.Linear(D, C), TypeError, r".* got Linear; pass \.bias of"),
        "row": Mistake(lambda v: v[None], ValueError, r".* got \[1, 4\]; pass bias\.flatten\(\)"),
    },
    "target": _TENSOR
    | {
        "one-hot": Mistake(
            lambda v: F.one_hot(v), ValueError, r".* got \[12, 4\]; .* pass target\.argmax\(1\)"
        ),
        "soft": Mistake(
            lambda v: F.one_hot(v).float(),
            TypeError,
            r".*float32 of shape \[12, 4\]; .*\.argmax\(1",
        ),
        "masks": Mistake(
            lambda v: F.one_hot(v).bool(), TypeError, r".*; .* pass target\.long\(\)\.argmax\(1\)"
        ),
        "column": Mistake(lambda v: v[:, None], ValueError, r".*; pass target\.squeeze\(1\)$"),
        "int column": Mistake(
            lambda v: v[:, None].int(), TypeError, r".*; pass target\.squeeze\(1\)\.long\(\)$"
        ),
        "int32": Mistake(lambda v: v.int(), TypeError, r".*\.int32 .*; pass target\.long\(\)$"),
        "uint8": Mistake(lambda v: v.byte(), TypeError, r".*\.uint8 .*; pass target\.long\(\)$"),
        "bool": Mistake(lambda v: v > 0, TypeError, r".*\.bool .*; pass target\.long\(\)$"),
        "float": Mistake(lambda v: v.float(), TypeError, r".*; if these .* pass target\.long\(\)$"),
        "gradient": Mistake(
            lambda v: v.float().requires_grad_(),
            TypeError,
            r".*\.float32 .* pass target\.long\(\)$",
        ),
        "sequence": Mistake(
            lambda v: v.view(3, 4), ValueError, r".*; pass target\.flatten\(\), with"
        ),
        "number": Mistake(
            lambda v: v[0], ValueError, r".*; for one sample pass target\.unsqueeze\("
        ),
        "short": Mistake(lambda v: v[:-1], ValueError, r"expected shape \[12\] .*, got \[11\]$"),
    },
    "ignore_index": {
        "float": Mistake(lambda _: -100.0, TypeError, r"expected an int, got float; pass int\("),
        "none": Mistake(lambda _: None, TypeError, r"expected an int, got NoneType; leave it out"),
        "tensor": Mistake(lambda v: torch.tensor(v), TypeError, r".* got Tensor; pass int\("),
        "numpy": Mistake(lambda v: np.int64(v), TypeError, r".* got int64; pass int\("),
        "bool": Mistake(lambda _: True, TypeError, r"expected an int, got bool$"),
    },
    "k": {
        "share": Mistake(lambda _: 0.1, TypeError, r".* float; pass k = int\(0\.1 \* N\), where N"),
        "float": Mistake(lambda _: 3.0, TypeError, r"expected an int, got float; pass int\(k\)"),
        "tensor": Mistake(
            lambda _: torch.tensor(3.0), TypeError, r".* got a tensor \[\] .*int\(k\)"
        ),
        "tensors": Mistake(lambda _: torch.ones(2).long(), TypeError, r".* got a tensor \[2\] of"),
        "text": Mistake(lambda _: "3", TypeError, r"expected an int, got str$"),
    },
}
MISTAKES["scores"] = MISTAKES["margins"] = {
    **{name: _TENSOR[name] for name in ("numpy", "list", "numbers", "tuple", "sparse")},
    "integer": _FLOAT["integer"],
    "column": Mistake(lambda v: v[:, None], ValueError, r".* got \[12, 1\]; pass \w+\.flatten\(\)"),
    "result": Mistake(
        lambda v: Selection(v, v), TypeError, r".* got Selection; pass one of its fields \(scores,"
    ),
}
