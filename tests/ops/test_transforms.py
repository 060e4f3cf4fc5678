"""Derivatives of every public function under every transform of PyTorch: right, or an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import marginops
from helpers.transform_cases import (
    BATCH,
    CASES,
    CLASSES,
    COLUMNS,
    FEATURES,
    IGNORED,
    KEPT,
    LOGITS,
    ROWS,
    TARGET,
    finite,
    loss,
    margin,
    random,
)

# Functions with a second derivative. The second derivative of the others is an error.
TWICE = [
    "classification_margin",
    "classification_margin of log_norm",
    "minimal_margin_score",
    "select_smallest",
    "select_minimal_margin",
    "select_classification_margin",
    "linear_classification_margin",
    "linear_minimal_margin_score",
    "linear_select_minimal_margin",
    "linear_select_classification_margin",
    "class_moments",
    "margin_area",
]


def scalar(function):
    return lambda x: function(x).sin().sum()


def leaf_gradient(function, x):
    x = x.clone().requires_grad_()
    function(x).backward()
    return x.grad


def vector_jacobian(function, x):
    value, pull = func.vjp(function, x)
    return pull(torch.ones_like(value))[0]


def batched_gradients(function, x):
    x = x.clone().requires_grad_()
    value = function(x).sin()
    basis = torch.eye(value.numel(), dtype=value.dtype).reshape(-1, *value.shape)
    return torch.autograd.grad(value, x, basis, is_grads_batched=True)[0]


def gradient_of_outer_level(function, x):
    """The derivative in ``scale`` of the derivative of something else that contains it."""

    def inner(scale):
        return func.grad(lambda z: z * function(scale * x).sum())(torch.ones((), dtype=x.dtype))

    return func.grad(inner)(torch.ones((), dtype=x.dtype))


def saved_elsewhere(function, x):
    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda value: value):
        value = scalar(function)(x)
    value.backward()
    return x.grad


# They get the function, one argument x and a batch of arguments.
FIRST = {
    "vmap": lambda f, x, xs: func.vmap(f)(xs),
    "vmap in_dims": lambda f, x, xs: func.vmap(f, in_dims=-1, out_dims=-1)(xs.movedim(0, -1)),
    "vmap vmap": lambda f, x, xs: func.vmap(func.vmap(f))(torch.stack((xs, 2 * xs))),
    "vmap inference": lambda f, x, xs: torch.inference_mode()(func.vmap(f))(xs).clone(),
    "grad": lambda f, x, xs: func.grad(scalar(f))(x),
    "grad_and_value": lambda f, x, xs: torch.stack(
        [part.sum() for part in func.grad_and_value(scalar(f))(x)]
    ),
    "vjp": lambda f, x, xs: vector_jacobian(f, x),
    "jacrev": lambda f, x, xs: func.jacrev(f)(x),
    "jacrev chunks": lambda f, x, xs: func.jacrev(f, chunk_size=2)(x),
    "grad vmap": lambda f, x, xs: func.grad(scalar(func.vmap(f)))(xs),
    "grad vmap chunks": lambda f, x, xs: func.grad(scalar(func.vmap(f, chunk_size=2)))(xs),
    "grad vmap randomness": lambda f, x, xs: func.grad(
        scalar(func.vmap(f, randomness="different"))
    )(xs),
    "vmap grad": lambda f, x, xs: func.vmap(func.grad(scalar(f)))(xs),
    "vjp vmap": lambda f, x, xs: vector_jacobian(func.vmap(f), xs),
    "jacrev vmap": lambda f, x, xs: func.jacrev(func.vmap(f))(xs),
    "vmap jacrev": lambda f, x, xs: func.vmap(func.jacrev(f))(xs),
    "leaf through vmap": lambda f, x, xs: leaf_gradient(scalar(func.vmap(f)), xs),
    "leaf through vmap vmap": lambda f, x, xs: leaf_gradient(
        scalar(func.vmap(func.vmap(f))), torch.stack((xs, 2 * xs))
    ),
    "grad in an outer level": lambda f, x, xs: gradient_of_outer_level(f, x),
    "batched gradients": lambda f, x, xs: batched_gradients(f, x),
    "jacobian": lambda f, x, xs: torch.autograd.functional.jacobian(f, x),
    "jacobian vectorized": lambda f, x, xs: torch.autograd.functional.jacobian(
        f, x, vectorize=True
    ),
    "functional vjp": lambda f, x, xs: torch.autograd.functional.vjp(scalar(f), x)[1],
    "checkpoint": lambda f, x, xs: leaf_gradient(
        lambda x: checkpoint(scalar(f), x, use_reentrant=False), x
    ),
    "saved tensor hooks": lambda f, x, xs: saved_elsewhere(f, x),
}
SECOND = {
    "grad grad": lambda f, x, xs: func.grad(scalar(func.grad(scalar(f))))(x),
    "jacrev jacrev": lambda f, x, xs: func.jacrev(func.jacrev(scalar(f)))(x),
    "vmap jacrev grad": lambda f, x, xs: func.vmap(func.jacrev(func.grad(scalar(f))))(xs),
    "functional hessian": lambda f, x, xs: torch.autograd.functional.hessian(scalar(f), x),
}


def dual_number(f, x, xs):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


FORWARD = {
    "jvp": lambda f, x, xs: func.jvp(f, (x,), (x,)),
    "jvp vmap": lambda f, x, xs: func.jvp(func.vmap(f), (xs,), (xs,)),
    "vmap jvp": lambda f, x, xs: func.vmap(lambda x: func.jvp(f, (x,), (x,)))(xs),
    "jacfwd": lambda f, x, xs: func.jacfwd(f)(x),
    "hessian": lambda f, x, xs: func.hessian(scalar(f))(x),
    "linearize": lambda f, x, xs: func.linearize(f, x)[1](x),
    "dual number": dual_number,
    "jacobian forward": lambda f, x, xs: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    function, plain, shape = CASES[request.param]
    return request.param, function, plain, random(BATCH, *shape)


def test_every_public_function_has_a_case():
    exempt = {"log_norm_product", "log_spectral_complexity", "support_vector_counts"}
    functions = {
        name
        for name in marginops.__all__
        if callable(getattr(marginops, name)) and not isinstance(getattr(marginops, name), type)
    }
    assert functions - exempt <= set(CASES)


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("transform", FIRST)
def test_first_derivative_is_right(case, transform):
    _, function, plain, batch = case
    actual, expected = (FIRST[transform](f, batch[0], batch) for f in (function, plain))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", SECOND)
def test_second_derivative_is_right_or_an_error(case, transform):
    name, function, plain, batch = case
    if name not in TWICE:
        with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
            SECOND[transform](function, batch[0], batch)
        return
    actual, expected = (SECOND[transform](f, batch[0], batch) for f in (function, plain))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("transform", FORWARD)
def test_forward_mode_is_an_error(case, transform):
    name, function, plain, batch = case
    # margin_area is plain PyTorch, which has forward-mode derivatives. So is the product of the
    # margins of a batch with a factor for each of its elements.
    scales_a_batch = (name, transform) == ("classification_margin of log_norm", "jvp vmap")
    if name == "margin_area" or scales_a_batch:
        actual, expected = (FORWARD[transform](f, batch[0], batch) for f in (function, plain))
        torch.testing.assert_close(actual, expected)
        return
    with pytest.raises(NotImplementedError, match=r"\w+: no forward-mode derivatives"):
        FORWARD[transform](function, batch[0], batch)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["grad", "vmap", "grad vmap", "vmap grad"])
@pytest.mark.parametrize("name", ["classification_margin", "linear_select_minimal_margin"])
def test_transforms_inside_a_compiled_function(name, transform):
    function, plain, shape = CASES[name]
    batch = random(BATCH, *shape)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, xs: FIRST[transform](function, x, xs), fullgraph=True)
    torch.testing.assert_close(compiled(batch[0], batch), FIRST[transform](plain, batch[0], batch))


def test_gradient_of_each_sample_of_a_network():
    network = torch.nn.Linear(COLUMNS, CLASSES, dtype=torch.float64)
    parameters = dict(network.named_parameters())

    def sample_loss(parameters, row, label, mean):
        logits = func.functional_call(network, parameters, (row[None],))
        return mean(logits, label[None])

    def gradients(mean):
        gradient = func.vmap(func.grad(sample_loss), in_dims=(None, 0, 0, None))
        return gradient(parameters, FEATURES[KEPT], TARGET[KEPT], mean)

    actual = gradients(lambda *a: marginops.sample_statistics(*a).mean_loss())
    torch.testing.assert_close(actual, gradients(F.cross_entropy))


@pytest.mark.parametrize("name", ["el2n", "gradient_norm"])
def test_gradient_of_a_field_without_one_is_an_error(name):
    def field(logits):
        return getattr(marginops.sample_statistics(logits, TARGET, input=FEATURES), name).sum()

    with pytest.raises(NotImplementedError, match=f"{name} in what is differentiated"):
        func.grad(field)(LOGITS)
    with pytest.raises(NotImplementedError, match=f"{name} in what is differentiated"):
        func.grad(lambda x: func.vmap(field)(x).sum())(random(BATCH, ROWS, CLASSES))
    # As a constant it is fine.
    weighted = func.grad(lambda x: (field(x).detach() * loss(x)).sum())(LOGITS)
    torch.testing.assert_close(weighted, field(LOGITS) * func.grad(lambda x: loss(x).sum())(LOGITS))


def test_empty_batch_is_an_error_where_each_element_is_a_call():
    with pytest.raises(NotImplementedError, match="select_smallest: expected a batch"):
        func.vmap(lambda x: marginops.select_smallest(x, 2).scores)(random(0, ROWS))


def test_direct_call_of_an_op_is_like_the_function():
    def direct(logits):
        return torch.ops.marginops.classification_margin(logits, TARGET, None, IGNORED)

    batch = random(BATCH, ROWS, CLASSES)
    for name, transform in FIRST.items():
        actual, expected = (
            transform(lambda x, f=f: finite(f(x)), batch[0], batch) for f in (direct, margin)
        )
        torch.testing.assert_close(actual, expected, msg=name)
    for transform in FORWARD.values():
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            transform(direct, batch[0], batch)


def test_state_has_no_derivative():
    def state():
        integers = [torch.zeros(size, dtype=torch.int64) for size in (2**16, 2)]
        return *integers, *(torch.zeros(shape, dtype=torch.float64) for shape in (2, (), ()))

    def update(margins):
        torch.ops.marginops.update_margin_distribution(*state(), margins)
        return margins.sum()

    margins = random(ROWS)
    with pytest.raises(NotImplementedError, match="do not require a gradient"):
        update(margins.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match="do not require a gradient"):
        func.grad(update)(margins)
    with pytest.raises(NotImplementedError, match="no forward-mode"):
        func.jvp(update, (margins,), (margins,))
