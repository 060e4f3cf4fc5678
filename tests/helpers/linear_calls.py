"""Equal calls of the functions of a linear head and of the plain functions on logits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

import marginops

from .strategies import small_integers


class Head(NamedTuple):
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor

    def to(self, *arguments) -> "Head":
        """The head on another device, or with floating-point tensors in another dtype."""
        *floating, target = self
        moved = (value if value is None else value.to(*arguments) for value in floating)
        devices = [value for value in arguments if not isinstance(value, torch.dtype)]
        return Head(*moved, target.to(*devices) if devices else target)

    def detach(self) -> "Head":
        return Head(*(value if value is None else value.detach() for value in self))

    def differentiable(self) -> list[torch.Tensor]:
        """The tensors that require a gradient."""
        return [value for value in self if value is not None and value.requires_grad]


def exact_head(device, dtype=torch.float32, rows=23, classes=7, columns=16, bias=True):
    """A head whose logits do not round; many of them are equal."""
    tensors = small_integers(rows, columns), small_integers(classes, columns)
    tensors += (small_integers(classes) if bias else None,)
    target = torch.randint(classes, (rows,))
    target[::5] = -100
    return Head(*tensors, target).to(device, dtype)


def random_head(device, dtype=torch.float64, rows=300, classes=10, columns=64):
    tensors = torch.randn(rows, columns), torch.randn(classes, columns), torch.randn(classes)
    target = torch.randint(classes, (rows,))
    target[::9] = -100
    return Head(*tensors, target).to(device, dtype)


def differentiable(head):
    for value in head[:3]:
        if value is not None:
            value.requires_grad_()
    return head


def gradients(function, variant, head, inputs=None, index=None, **options):
    """The gradient of all differentiable fields, or of that at ``index``; rows have weights."""
    fields = [field for field in function(variant, head, **options) if field.requires_grad]
    fields = fields if index is None else [fields[index]]
    weights = [torch.arange(len(field), device=field.device) % 7 - 2.0 for field in fields]
    weights = [value.to(field.dtype) for value, field in zip(weights, fields, strict=True)]
    return torch.autograd.grad(fields, inputs or head.differentiable(), weights)


# Names of public functions without linear_, and their options.
VARIANTS = {
    "margin": ("classification_margin", {}),
    "normalized_margin": ("classification_margin", {"log_norm": 0.5}),
    "score": ("minimal_margin_score", {}),
    "score_with_bias": ("minimal_margin_score", {"bias_in_norm": True}),
    "nearest": ("minimal_margin_score", {"rival": "nearest", "bias_in_norm": True}),
    "statistics": ("sample_statistics", {"log_norm": -0.25}),
    "select_margin": ("select_classification_margin", {"log_norm": 0.5}),
    "select_score": ("select_minimal_margin", {"bias_in_norm": True}),
    "select_nearest": ("select_minimal_margin", {"rival": "nearest"}),
}
LABELLED = ("margin", "normalized_margin", "statistics", "select_margin")
SCORES = tuple(name for name in VARIANTS if name not in LABELLED)


def linear(variant, head, chunk_bytes=None, **options) -> tuple[torch.Tensor, ...]:
    """Call the function of the linear head with the features."""
    name, arguments = _arguments(variant, head, options)
    function = getattr(marginops, f"linear_{name}")
    return _fields(function(*head[:2], bias=head.bias, chunk_bytes=chunk_bytes, **arguments))


def plain(variant, head, **options) -> tuple[torch.Tensor, ...]:
    """Call the plain function with all logits at once."""
    name, arguments = _arguments(variant, head, options)
    if name == "sample_statistics":
        arguments["input"] = head.input
    if variant in SCORES:
        arguments |= {"weight": head.weight, "bias": head.bias}
    logits = F.linear(head.input, head.weight, head.bias)
    return _fields(getattr(marginops, name)(logits, **arguments))


def chunk_of(rows: int, head: Head) -> int:
    """The size of so many rows of logits in bytes."""
    return rows * head.weight.shape[0] * head.weight.element_size()


def _arguments(variant, head, options):
    name, arguments = VARIANTS[variant]
    arguments = arguments | options
    if head.bias is None:
        arguments.pop("bias_in_norm", None)
    if name.startswith("select") and "k" not in arguments:
        arguments["k"] = len(head.input) // 2
    if variant in LABELLED:
        arguments["target"] = head.target
    return name, arguments


def _fields(result) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
