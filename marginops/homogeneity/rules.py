"""The rate of the result of each operation. A rule also adds the equations of the operation."""

import math
from collections.abc import Callable

import torch

from .operation import Operation
from .system import Form

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

Rule = Callable[[Operation], Form | None]


def keep(operation: Operation) -> Form | None:
    """The result has the rate of the first operand."""
    return operation.first().rate


def look_up(operation: Operation) -> Form | None:
    """A lookup keeps the rate.

    If the input of the network chooses the rows, the lookup is a product with a one-hot matrix. So
    the table counts as a factor.
    """
    value, *indices = operation.values()
    if any(index.varies for index in indices):
        operation.system.factors |= value.weights
    return value.rate


def choose(operation: Operation) -> Form | None:
    """The result has rate 0, because it depends on signs and order only."""
    return operation.system.constant()


def scaled(factor: float) -> Rule:
    """The result has ``factor`` times the rate of the first operand."""

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
    """The operands of these names and the result have the same rate."""
    return lambda operation: operation.equal(*operation.values(*names))


def product(*names: str, plus: str | None = None) -> Rule:
    """The rates of the operands are added. The operand ``plus`` has the rate of the result."""

    def rule(operation: Operation) -> Form | None:
        rate = operation.system.product(operation.values(*names))
        return operation.equal(rate, *operation.values(plus)) if plus else rate

    return rule


def normalization(operation: Operation) -> Form | None:
    """The normalised input has rate 0. Scale and shift have the rate of the result."""
    value, system = operation.first(), operation.system
    given = operation.arguments
    from_input = given.get("training", given.get("use_input_stats", True))
    if operation.name.endswith("no_training") or not from_input:
        reason = "its input must have rate 0, because its running statistics have rate 0"
        operation.zero(value, reason)
    affine = operation.values("weight", "bias")
    for upstream in (value, *affine):
        system.normalizing |= upstream.parameters
    scale = operation.values("weight")
    return operation.equal(
        system.product(scale) if scale else system.constant(), *operation.values("bias")
    )


def weight_normalization(operation: Operation) -> Form | None:
    """The result ``g v / |v|`` has the rate of g. The rate of v has no effect."""
    direction, length = operation.values("v", "g")
    operation.system.normalizing |= direction.parameters
    operation.system.product([direction])
    return operation.system.product([length])


def cosine(operation: Operation) -> Form | None:
    """The cosine has rate 0, because it does not depend on the lengths of its operands."""
    for value in operation.values("x1", "x2"):
        operation.system.normalizing |= value.parameters
        operation.system.product([value])
    return operation.system.constant()


def quotient(operation: Operation) -> Form | None:
    """The rate of the divisor is subtracted from that of the dividend."""
    if operation.arguments.get("rounding_mode") is not None:
        raise operation.error("rounds, so it is not quasi-homogeneous")
    dividend, divisor = operation.values("self", "other")
    operation.system.product([dividend, divisor])
    if divisor.rate is None:
        raise operation.error("divides by zeros")
    return None if dividend.rate is None else dividend.rate - divisor.rate


def power(operation: Operation) -> Form | None:
    """The exponent, which has to be a number, multiplies the rate."""
    return scaled(operation.number("exponent"))(operation)


def product_of_elements(operation: Operation) -> Form | None:
    """A product has as many factors as there are elements in the dimension."""
    size, dim = operation.sizes["self"], operation.arguments.get("dim")
    return scaled(math.prod(size) if dim is None else size[dim] if size else 1)(operation)


def bounded(operation: Operation) -> Form | None:
    """The input has the rate of its bounds, which are constants unless they are 0."""
    return operation.equal(*operation.values("self", "min", "max"))


def threshold(operation: Operation) -> Form | None:
    """The input has the rate of threshold and value, which are constants unless they are 0."""
    return operation.equal(*operation.values("self", "threshold", "value"))


def padded(operation: Operation) -> Form | None:
    """The input has the rate of the padded value, which may be 0."""
    value = operation.arguments.get("value")
    return operation.equal(operation.first(), *(operation.values("value") if value else []))


def parametric_relu(operation: Operation) -> Form | None:
    """The result has the rate of the input, and the slope has rate 0."""
    value, slope = operation.values("self", "weight")
    operation.system.product([slope])
    operation.zero(slope, "its weight must have rate 0")
    return value.rate


def interpolation(*names: str) -> Rule:
    """The terms have the same rate. The last operand, a weight or grid, has rate 0."""

    def rule(operation: Operation) -> Form | None:
        *terms, position = operation.values(*names)
        operation.zero(position, "its weight or grid must have rate 0")
        return operation.equal(*terms)

    return rule


def cast(operation: Operation) -> Form | None:
    """A cast keeps the rate. A cast to integers rounds, so only zeros have a rule."""
    if operation.arguments.get("dtype") in INTEGERS and operation.first().rate is not None:
        raise operation.error("rounds, so it is not quasi-homogeneous")
    return keep(operation)


def filled(operation: Operation) -> Form | None:
    """A constant has rate 0. Zeros have every rate."""
    return operation.equal(*operation.values("fill_value", "value"))


def zeros(operation: Operation) -> Form | None:
    """Zeros have every rate."""
    return None


def scattered(operation: Operation) -> Form | None:
    """The values that are written and the others have the same rate."""
    if operation.arguments.get("reduce") is not None:
        raise operation.error("has no rule with reduce")
    return operation.equal(*operation.values("self", "src", "value"))


def variance_and_mean(operation: Operation) -> Form | None:
    """Variance and mean have different rates unless the input has rate 0, which is required."""
    operation.zero(operation.first(), "its input must have rate 0")
    return operation.system.constant()


def normed(rule: Rule) -> Rule:
    """A norm has the rate of ``rule``. The 0-norm counts elements and has rate 0."""

    def norm_rule(operation: Operation) -> Form | None:
        rate = rule(operation)
        order = operation.arguments.get("ord", operation.arguments.get("p"))
        return operation.system.constant() if order == 0 else rate

    return norm_rule
