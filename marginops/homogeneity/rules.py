"""What each operation of a network does to the rates of its operands."""

import math
from collections.abc import Callable

import torch

from .operation import Operation
from .system import Form

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Rule = Callable[[Operation], Form | None]


def keep(operation: Operation) -> Form | None:
    """The rate of the first operand."""
    return operation.first().rate


def look_up(operation: Operation) -> Form | None:
    """Rows that the network's input chooses: a product with their one-hot matrix."""
    value, *places = operation.values()
    if any(place.varies for place in places):
        operation.system.factors |= value.weights
    return value.rate


def choose(operation: Operation) -> Form | None:
    """Depends on signs and order only."""
    return operation.system.constant()


def scaled(factor: float) -> Rule:
    """A multiple of the first operand's rate."""

    def rule(operation: Operation) -> Form | None:
        value = operation.first()
        operation.system.factors |= value.weights
        if factor == 0:
            return operation.system.constant()
        if value.rate is None and factor < 0:
            raise operation.error("divides by zeros")
        return None if value.rate is None else factor * value.rate

    return rule


def equal(*names: str) -> Rule:
    """Operands of these names have the same rate, which is that of the result."""
    return lambda operation: operation.equal(*operation.values(*names))


def product(*names: str, plus: str | None = None) -> Rule:
    """The operands' rates are added; one more operand has the rate of the result."""

    def rule(operation: Operation) -> Form | None:
        rate = operation.system.product(operation.values(*names))
        return operation.equal(rate, *operation.values(plus)) if plus else rate

    return rule


def normalization(operation: Operation) -> Form | None:
    """Starts again at 0; scale and shift have the rate of the result."""
    value, system = operation.first(), operation.system
    given = operation.arguments
    from_input = given.get("training", given.get("use_input_stats", True))
    if operation.name.endswith("no_training") or not from_input:
        reason = "its input must have rate 0, which its running statistics have"
        operation.zero(value, reason)
    affine = operation.values("weight", "bias")
    for upstream in (value, *affine):
        system.normalizing |= upstream.parameters
    scale = operation.values("weight")
    return operation.equal(
        system.product(scale) if scale else system.constant(), *operation.values("bias")
    )


def weight_normalization(operation: Operation) -> Form | None:
    """``g v / |v|``: v may have any rate."""
    direction, length = operation.values("v", "g")
    operation.system.normalizing |= direction.parameters
    operation.system.product([direction])
    return operation.system.product([length])


def cosine(operation: Operation) -> Form | None:
    """Does not depend on the size of either."""
    for value in operation.values("x1", "x2"):
        operation.system.normalizing |= value.parameters
        operation.system.product([value])
    return operation.system.constant()


def quotient(operation: Operation) -> Form | None:
    """The difference of the rates."""
    if operation.arguments.get("rounding_mode") is not None:
        raise operation.error("rounds, so it is not quasi-homogeneous")
    above, below = operation.values("self", "other")
    operation.system.product([above, below])
    if below.rate is None:
        raise operation.error("divides by zeros")
    return None if above.rate is None else above.rate - below.rate


def power(operation: Operation) -> Form | None:
    """A number as exponent multiplies the rate."""
    return scaled(operation.number("exponent"))(operation)


def product_of_elements(operation: Operation) -> Form | None:
    """As many factors as elements in the dimension."""
    size, dim = operation.sizes["self"], operation.arguments.get("dim")
    return scaled(math.prod(size) if dim is None else size[dim] if size else 1)(operation)


def bounded(operation: Operation) -> Form | None:
    """A bound other than 0 is a constant beside the input."""
    return operation.equal(*operation.values("self", "min", "max"))


def threshold(operation: Operation) -> Form | None:
    """As a bound."""
    return operation.equal(*operation.values("self", "threshold", "value"))


def padded(operation: Operation) -> Form | None:
    """Zeros, or the value, beside the input."""
    value = operation.arguments.get("value")
    return operation.equal(operation.first(), *(operation.values("value") if value else []))


def parametric_relu(operation: Operation) -> Form | None:
    """The slope must not grow."""
    value, slope = operation.values("self", "weight")
    operation.system.product([slope])
    operation.zero(slope, "its weight must have rate 0")
    return value.rate


def interpolation(*names: str) -> Rule:
    """Between terms, at the place that the last operand says, which must not grow."""

    def rule(operation: Operation) -> Form | None:
        *terms, place = operation.values(*names)
        operation.zero(place, "its weight or grid must have rate 0")
        return operation.equal(*terms)

    return rule


def cast(operation: Operation) -> Form | None:
    """Another dtype; integers would round, except zeros."""
    if operation.arguments.get("dtype") in INTEGERS and operation.first().rate is not None:
        raise operation.error("rounds, so it is not quasi-homogeneous")
    return keep(operation)


def filled(operation: Operation) -> Form | None:
    """A constant, or any rate where it is zero."""
    return operation.equal(*operation.values("fill_value", "value"))


def zeros(operation: Operation) -> Form | None:
    """Any rate."""
    return None


def scattered(operation: Operation) -> Form | None:
    """Terms put among others, unless it multiplies them."""
    if operation.arguments.get("reduce") is not None:
        raise operation.error("has no rule with reduce")
    return operation.equal(*operation.values("self", "src", "value"))


def variance_and_mean(operation: Operation) -> Form | None:
    """Two results of different rates: only right where both are 0."""
    operation.zero(operation.first(), "its input must have rate 0")
    return operation.system.constant()


def normed(rule: Rule) -> Rule:
    """A norm of what has the rate of this rule; the 0-norm only counts."""

    def counted(operation: Operation) -> Form | None:
        rate = rule(operation)
        order = operation.arguments.get("ord", operation.arguments.get("p"))
        return operation.system.constant() if order == 0 else rate

    return counted
