"""The rule of each ATen operation: the rate of its result. A rule also adds its equations."""

import math
from collections.abc import Callable

import torch

from .._operations import KEEPING, NEVER, NORMALIZING, POWERS
from .equations import Form, Operation

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


LOOK_UP = """
    embedding gather index index_select masked_select take take_along_dim _unsafe_index
"""

CHOOSE = """
    argmax argmin argsort count_nonzero empty_like isfinite isinf isnan new_empty new_ones
    ones_like rand_like randn_like sgn sign signbit sym_numel sym_size sym_stride
"""

CAST = "to _to_copy"

EQUAL = {
    "self other": "add sub rsub max min maximum minimum fmax fmin where gt ge lt le eq ne",
    "tensors": "cat concat concatenate stack hstack vstack dstack column_stack row_stack",
    "self value": "masked_fill index_fill",
    "self source": "masked_scatter index_add index_copy",
    "self src": "slice_scatter select_scatter diagonal_scatter as_strided_scatter scatter_add",
    "self values": "index_put",
    "src": "copy",
}

PRODUCT = {
    "self other": "mul vdot inner matmul kron linalg_cross cross tensordot",
    "self mat2": "mm bmm",
    "self tensor": "dot",
    "x y": "linalg_vecdot",
    "self vec": "mv",
    "self vec2": "outer ger",
    "tensors": "einsum linalg_multi_dot",
    "matrices": "chain_matmul",
}

AFFINE = {
    "input weight": """linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d
        conv_transpose3d convolution""",
    "input1 input2 weight": "bilinear",
}

ADDED = {
    "mat1 mat2": "addmm",
    "batch1 batch2": "addbmm baddbmm",
    "mat vec": "addmv",
    "vec1 vec2": "addr",
    "tensor1 tensor2": "addcmul",
}


def _table() -> dict[str, Rule]:
    table: dict[str, Rule] = {}

    def follow(rule: Rule, names: str) -> None:
        table.update(dict.fromkeys(names.split(), rule))

    follow(keep, KEEPING)
    follow(look_up, LOOK_UP)
    follow(choose, CHOOSE)
    follow(normalization, NORMALIZING)
    follow(zeros, "zeros zeros_like new_zeros")
    follow(filled, "full full_like new_full fill")
    follow(bounded, "clamp clamp_min clamp_max clip")
    follow(threshold, "threshold")
    follow(padded, "pad constant_pad_nd")
    follow(cast, CAST)
    follow(normed(keep), "linalg_vector_norm norm")
    follow(normed(equal("self", "other")), "dist")
    follow(normed(equal("x1", "x2")), "cdist")
    follow(parametric_relu, "prelu _prelu_kernel")
    follow(interpolation("self", "end", "weight"), "lerp")
    follow(interpolation("input", "grid"), "grid_sampler grid_sampler_2d grid_sampler_3d")
    follow(scattered, "scatter")
    follow(quotient, "div divide true_divide")
    follow(variance_and_mean, "var_mean")
    follow(power, "pow")
    follow(product_of_elements, "prod")
    follow(cosine, "cosine_similarity")
    follow(weight_normalization, "_weight_norm _weight_norm_interface")
    follow(product("weight", "per_sample_weights"), "embedding_bag _embedding_bag")
    for name, exponent in POWERS.items():
        follow(scaled(exponent), name)
    for operands, names in EQUAL.items():
        follow(equal(*operands.split()), names)
    for operands, names in PRODUCT.items():
        follow(product(*operands.split()), names)
    for operands, names in AFFINE.items():
        follow(product(*operands.split(), plus="bias"), names)
    for operands, names in ADDED.items():
        follow(product(*operands.split(), plus="self"), names)
    return table


RULES = _table()
# An operation that is neither here nor in RULES has no rule yet.
UNSCALED = frozenset(NEVER.split())
# Operations on parameters whose results are views or sums of these parameters.
CARRYING = frozenset(f"{KEEPING} {LOOK_UP} {CAST} {' '.join(EQUAL.values())}".split())
# Operations that create constants, which may be 0.
CREATING = frozenset(["zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"])
