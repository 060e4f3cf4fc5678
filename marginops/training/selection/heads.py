"""Checks that the logits of a network follow from the weight of its head.

Scores divide differences of logits by distances between the rows of the head's weight. If something
else computes the logits (an adapter, a scale, a softmax), these distances do not fit them.
"""

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks as checks
from ...networks import unwrap, watch_layer
from .adapters import adapter_state, is_adapted_linear
from .head_kinds import Head, Products, gathered, head_bias, head_weight

_ADVICE = (
    "merge an adapter into the layer, pass head=, the layer that computes the logits, or "
    "pass weight=, the tensor [C, D] whose distances between rows fit the logits"
)
# What was known about a head of a network when the check passed. The references are weak.
_passed: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, Any]] = WeakKeyDictionary()


def is_checked(network: nn.Module, head: Head) -> bool:
    """Whether the check of this head has passed, or cannot be made as in compiled code."""
    if torch.compiler.is_compiling():
        return True
    network = unwrap(network)
    known = _passed.get(network)
    return known is not None and known.get(head) == _facts(network, head)


def can_read(logits: Tensor) -> bool:
    """Whether there are values, and Python may read them: not in a graph that is recorded."""
    capturing = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    return checks.has_values(logits) and len(logits) > 0 and not capturing


def check_head(network: nn.Module, inputs: Any, head: Head, at: int | str | None = None) -> Tensor:
    """Check that the logits are ``F.linear(features, head.weight, head.bias)``.

    They may differ by a constant in each row, as log-probabilities do. The check runs the network,
    once as it is and once with other values of the other parameters, and waits for the device. If
    it passes, :func:`is_checked` is true from now on.

    Args:
        network: Any network.
        inputs: A batch.
        head: The layer whose weight is going to be used.
        at: The place of the logits in the output, see :func:`marginops.networks.output_tensor`.

    Returns:
        The logits. They are not checked if nobody can read them.

    Raises:
        ValueError: The logits do not follow from this layer.
    """
    checks.check_tensor("weight", head_weight(head), 2, "[C, D]")
    network = unwrap(network)
    facts = _facts(network, head)
    calls, logits = _watch(network, inputs, head, at)
    if not can_read(logits):
        return logits
    if not calls:
        raise ValueError(
            "head: expected network to call this layer at least once in a forward pass, got 0 "
            f"calls; {_ADVICE}"
        )
    expected = (
        f"head: expected logits F.linear(features, weight, bias) of {type(head).__name__} "
        f"{facts.path!r}, up to a constant in each row"
    )
    parameters = head_weight(head), head_bias(head)
    agreements = [
        _agreement(features, output, head, logits, parameters) for features, output in calls
    ]
    if not any(agreement.agrees for agreement in agreements):
        difference = min(agreement.difference for agreement in agreements)
        got = f"got a difference of {difference:.3g}"
        if difference == torch.inf:
            shapes = [[*features.shape] for features, _ in calls]
            got = (
                f"got logits {[*logits.shape]} for features {', '.join(map(str, shapes))} and "
                f"weight {[*head_weight(head).shape]}"
            )
        elif _are_probabilities(logits):
            got = f"{got}; the logits look like probabilities"
        raise ValueError(f"{expected}, {got}; {_ADVICE}")
    if any(agreement.agrees and agreement.is_conclusive for agreement in agreements):
        if difference := _difference_after_training(network, inputs, head, at):
            raise ValueError(
                f"{expected}, whatever values the other parameters take, got a difference of "
                f"{difference:.3g} for others, as of an adapter or a scale that has no effect yet; "
                f"{_ADVICE}"
            )
        _passed.setdefault(network, WeakKeyDictionary())[head] = facts
    return logits


def _watch(
    network: nn.Module, inputs: Any, head: Head, at: int | str | None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """The features and outputs of every call of the head, and the logits."""
    if not isinstance(head, nn.Embedding):
        return watch_layer(network, inputs, head, at)
    with Products(head.weight) as products:  # the calls of an embedding look up rows
        _, logits = watch_layer(network, inputs, head, at)
    return products.calls, logits


def _difference_after_training(
    network: nn.Module, inputs: Any, head: Head, at: int | str | None
) -> float:
    """How far the logits are from those of the head if training changes all other parameters.

    It is 0 if they agree. An adapter or a learned scale may be without effect before training.
    """
    others = _trained_parameters(network, head)
    if not others:
        return 0.0
    try:
        calls, logits = _watch(_WithParameters(network, others), inputs, head, at)
    except Exception:  # The network takes no such parameters. Nothing else is wrong with it.
        return 0.0
    parameters = _parameters(head, _path(network, head), others)
    agreements = [
        _agreement(features, output, head, logits, parameters) for features, output in calls
    ]
    if not agreements or any(agreement.agrees for agreement in agreements):
        return 0.0
    return min(agreement.difference for agreement in agreements)


class _WithParameters(nn.Module):
    """A network with other values of some parameters, which does not change the network."""

    def __init__(self, network: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.values = values

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return torch.func.functional_call(self.network, self.values, arguments, keywords)


class _AdaptedParameters(nn.Module):
    """Weight and bias of a head with adapters, as the output of a module."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return head_weight(self.head), head_bias(self.head)


def _parameters(
    head: Head, path: str | None, others: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a head; with adapters, those that follow from ``others``."""
    if path is None or not is_adapted_linear(head):
        return head_weight(head), head_bias(head)
    prefix = f"{path}." if path else ""
    own = {
        f"head.{name.removeprefix(prefix)}": value
        for name, value in others.items()
        if name.startswith(prefix)
    }
    parameters: tuple[Tensor, Tensor | None] = torch.func.functional_call(
        _AdaptedParameters(head), own, ()
    )
    return parameters


@torch.no_grad()
def _trained_parameters(network: nn.Module, head: Head) -> dict[str, Tensor]:
    """Other values of all parameters that are trained, but for weight and bias of the head."""
    own = [head._parameters.get(name) for name in ("weight", "bias")]
    computing = getattr(head, "parametrizations", None)  # they compute weight or bias
    skipped = set() if computing is None else set(computing.modules())
    values = {}
    for path, module in network.named_modules():
        # A hook such as that of pruning writes what it computes into its module.
        if module in skipped or module._forward_pre_hooks:
            continue
        for name, value in module.named_parameters(path, recurse=False):
            is_own = any(value is each for each in own)
            if is_own or not value.requires_grad or value.dtype not in checks.FLOATING:
                continue
            if checks.is_distributed(value):  # such a network takes no parameters from outside
                continue
            generator = torch.Generator(value.device).manual_seed(0)
            noise = torch.empty_like(value).normal_(generator=generator)
            size = torch.linalg.vector_norm(value, dtype=checks.result_dtype(value.dtype))
            size = torch.where(size > 0, size / max(value.numel(), 1) ** 0.5, 1)
            values[name] = value + 0.1 * size * noise
    return values


class _Facts(NamedTuple):
    """What changes if somebody replaces, wraps or hooks the head or the network."""

    path: str | None
    kinds: tuple[type, type]
    hooks: tuple[int, ...]
    patched: tuple[bool, bool]
    adapters: tuple[tuple[Any, ...], ...]


def _facts(network: nn.Module, head: Head) -> _Facts:
    both = network, head
    path = _path(network, head)
    names = [] if path is None else path.split(".")
    around = [network.get_submodule(".".join(names[:count])) for count in range(len(names) + 1)]
    return _Facts(
        path,
        (type(network), type(head)),
        tuple(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in both),
        ("forward" in vars(network), "forward" in vars(head)),
        tuple(map(adapter_state, around)),
    )


def _path(network: nn.Module, head: Head) -> str | None:
    return next((path for path, module in network.named_modules() if module is head), None)


def _are_probabilities(logits: Tensor) -> bool:
    sums = logits.double().sum(1)
    return bool((logits >= 0).all() and ((sums - 1).abs() < 0.02).all())


class _Agreement(NamedTuple):
    """Whether a call of the head computes the logits.

    Attributes:
        agrees: Whether the difference is one of rounding.
        is_conclusive: Whether other logits would have shown. Logits that are all 0 agree with
            any multiple of themselves.
        difference: The largest difference, without a constant in each row.
    """

    agrees: bool
    is_conclusive: bool
    difference: float


@torch.no_grad()
def _agreement(
    features: Tensor,
    output: Tensor,
    head: Head,
    logits: Tensor,
    parameters: tuple[Tensor, Tensor | None],
) -> _Agreement:
    """Compare the logits with what the weight makes of the features, in the head's arithmetic.

    Features ``[B, T, D]`` give T candidates for each row of logits, and their mean is one more.
    """
    (weight, bias), batch, features = parameters, len(logits), gathered(features)
    classes, columns = weight.shape
    if head.weight.dim() > 2 and features.dim() > 1:  # a convolution has its channels second
        features = features.movedim(1, -1)
    if features.shape[0] != batch or features.shape[-1] != columns or classes != logits.shape[1]:
        return _Agreement(False, False, torch.inf)
    positions = features[0].numel() // columns
    rows = max(1, min(batch, 2**22 // (positions * classes)))
    kept = features[:rows].reshape(rows, positions, columns).to(output.dtype)
    weight = weight.to(output.dtype)
    bias = None if bias is None else bias.to(output.dtype)
    with torch.autocast(logits.device.type, enabled=False):
        expected = F.linear(kept, weight, bias)
    dtype = checks.result_dtype(output.dtype)
    seen, expected = logits[:rows].to(expected.device, dtype).unsqueeze(1), expected.to(dtype)
    expected = torch.cat((expected, expected.mean(1, keepdim=True)), 1)

    # Logits may hold infinities, for example in classes that a mask excludes.
    finite = seen.isfinite() & expected.isfinite()
    count = finite.sum(-1, keepdim=True).clamp(min=1)
    seen, expected = torch.where(finite, seen, 0), torch.where(finite, expected, 0)
    difference = seen - expected
    difference = torch.where(finite, difference - difference.sum(-1, keepdim=True) / count, 0)
    largest = difference.abs().amax(-1)
    rounding = _rounding(kept, weight, torch.maximum(seen.abs(), expected.abs()), logits)
    best = (largest - rounding).argmin(1, keepdim=True)
    largest, rounding = largest.gather(1, best), rounding.gather(1, best)
    spread = (expected.amax(-1) - expected.amin(-1)).gather(1, best)
    # Where features are not finite there is nothing to compare, as after a training that diverged.
    agrees = (largest <= rounding) | ~rounding.isfinite()
    return _Agreement(
        bool(agrees.all()),
        bool((spread > 2 * rounding).any()),
        largest.max().item(),
    )


def _rounding(features: Tensor, weight: Tensor, size: Tensor, logits: Tensor) -> Tensor:
    """Bounds of rounding errors of a row of logits, ``[B, T + 1]``.

    The sums are accumulated in float32 or float64, and both results are rounded to their dtype.
    """
    wide = size.dtype
    product = torch.linalg.vector_norm(features, dim=-1, dtype=wide)
    product = product * torch.linalg.vector_norm(weight, dim=1, dtype=wide).amax()
    product = torch.cat((product, product.amax(1, keepdim=True)), 1)
    narrow = max(torch.finfo(features.dtype).eps, torch.finfo(logits.dtype).eps)
    rounded = size.amax(-1) + product / weight.shape[1] ** 0.5
    return 8 * torch.finfo(wide).eps * product + 4 * narrow * rounded
