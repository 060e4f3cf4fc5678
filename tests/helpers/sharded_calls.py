"""Calls of linear heads whose classes are spread over processes."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch

import marginops
from helpers.ranks import Ranks
from helpers.rounding import assert_same
from marginops._checks import result_dtype

DIFFERENTIABLE = ("input", "weight", "bias", "log_norm")
# If the logits are exact, these are bit for bit the same for any number of processes.
EXACT = {"differentiable", "value", "margin", "rival", "top2_margin", "correct"}
EXACT |= {"scores", "indices"}
DIFFERENTIABLE_FIELDS = ["margin", "loss", "confidence", "entropy"]
FUNCTIONS = [
    "classification_margin",
    "minimal_margin_score",
    "sample_statistics",
    "select_minimal_margin",
    "select_classification_margin",
]


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a public function.

    Attributes:
        function: The name without ``linear_``.
        arguments: The arguments by name.
        grads: The gradient of each result that is to be differentiated, by the result's name.
        autocast: Whether the call runs under autocast with bfloat16.
        frozen: The arguments that need no gradient.
    """

    function: str
    arguments: dict[str, Any]
    grads: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    autocast: bool = False
    frozen: frozenset[str] = frozenset()

    def replace(self, **arguments: Any) -> "Call":
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})

    def drop(self, *names: str) -> "Call":
        kept = {name: value for name, value in self.arguments.items() if name not in names}
        return dataclasses.replace(self, arguments=kept)

    def shards(self, sizes: Sequence[int]) -> list["Call"]:
        """The calls of all ranks, where each rank has so many classes."""
        assert sum(sizes) == len(self.arguments["weight"])
        weights = self.arguments["weight"].split(list(sizes))
        bias = self.arguments.get("bias")
        biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
        return [
            self.replace(weight=weight.clone(), bias=None if bias is None else bias.clone())
            for weight, bias in zip(weights, biases, strict=True)
        ]

    def __call__(self, group: Any = None) -> dict[str, torch.Tensor]:
        """The results of the call by name, and the gradients of its arguments."""
        needing_grad = {*DIFFERENTIABLE} - self.frozen if self.grads else set()
        arguments = {
            name: value.clone().requires_grad_(name in needing_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.arguments.items()
        }
        function = getattr(marginops, f"linear_{self.function}")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            returned = function(**arguments, group=group)
        results = {"value": returned} if torch.is_tensor(returned) else returned._asdict()
        differentiable = torch.tensor([value.requires_grad for value in results.values()])
        if self.grads:
            outputs = [results[name] for name in self.grads]
            torch.autograd.backward(outputs, list(self.grads.values()))
        for name in DIFFERENTIABLE:
            gradient = getattr(arguments.get(name), "grad", None)
            if gradient is not None:
                results[f"grad_{name}"] = gradient
        results = {name: value.detach() for name, value in results.items()}
        return {**results, "differentiable": differentiable}


def call_all(groups: Sequence[Any], calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
    """The results of calls over the group of all ranks."""
    return [call(groups[0]) for call in calls]


def results_of(
    ranks: Ranks, calls: Sequence[Call], sizes: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """The results of each call, equal on all ranks, with the gradients of all classes joined."""
    shards = zip(*(call.shards(sizes) for call in calls), strict=True)
    per_rank = ranks.results(call_all, list(shards))
    return [_joined(results) for results in zip(*per_rank, strict=True)]


def _joined(results: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    joined = {}
    for name, value in results[0].items():
        values = [others[name] for others in results]
        if name in ("grad_weight", "grad_bias"):
            joined[name] = torch.cat(values)
        else:
            for other in values:
                assert_same(other, value)
            joined[name] = value
    return joined


def assert_like_one_process(
    ranks: Ranks,
    calls: Sequence[Call],
    sizes: Sequence[int],
    exact: Collection[str],
    tolerance: float,
) -> None:
    """Compare with one process. ``sizes`` are numbers of classes; ``exact`` results are equal."""
    for call, actual in zip(calls, results_of(ranks, calls, sizes), strict=True):
        expected = call()
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            allowed = 0 if name in exact else tolerance
            torch.testing.assert_close(
                actual[name],
                value,
                rtol=allowed,
                atol=allowed,
                equal_nan=True,
                msg=lambda text, where=(call.function, name): f"{where}: {text}",
            )


def exact(*shape):
    """Numbers whose products and their sums are exact, with many equal sums."""
    return torch.randint(-3, 4, shape).double() / 2


def example(function="sample_statistics", dtype=torch.float64, make=torch.randn, **options):
    """A call for 9 classes with all arguments that its function takes."""
    rows, classes, columns = 40, 9, 6
    arguments = {
        "input": make(rows, columns).to(dtype),
        "weight": make(classes, columns).to(dtype),
        "bias": make(classes).to(dtype),
    }
    if function in ("minimal_margin_score", "select_minimal_margin"):
        arguments["bias_in_norm"] = True
    else:
        arguments["target"] = torch.randint(classes, (rows,))
        arguments["target"][::7] = -100
        arguments["log_norm"] = torch.tensor(0.5, dtype=dtype)
    if function.startswith("select"):
        arguments["k"] = 15
    return Call(function, {**arguments, **options})


def with_gradient(call, *fields):
    """The call with gradients of these results, or of its only result."""
    rows = call.arguments.get("k", len(call.arguments["input"]))
    default = ["scores"] if "k" in call.arguments else ["value"]
    if call.function == "sample_statistics":
        default = DIFFERENTIABLE_FIELDS
    dtype = result_dtype(call.arguments["input"].dtype)
    grads = {name: torch.randn(rows, dtype=dtype) for name in fields or default}
    return dataclasses.replace(call, grads=grads)
