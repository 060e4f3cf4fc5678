"""Derivatives of every public function under every transform of PyTorch: right, or an error."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import marginops

BATCH, ROWS, CLASSES, COLUMNS = 3, 6, 4, 5
IGNORED = -100


def random(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    )


TARGET = torch.tensor([0, IGNORED, 2, 3, 1, 0])
KEPT = TARGET != IGNORED
LABEL = TARGET.clamp(min=0)
LOGITS, FEATURES = random(ROWS, CLASSES), random(ROWS, COLUMNS)
WEIGHT, BIAS = random(CLASSES, COLUMNS), random(CLASSES)


def rival_value(logits):
    return logits.masked_fill(F.one_hot(LABEL, CLASSES).bool(), -math.inf).max(-1)


def margin(logits, log_norm=0.0):
    own = logits.gather(1, LABEL[:, None]).squeeze(1)
    value = (own - rival_value(logits).values) * torch.exp(-torch.as_tensor(log_norm))
    return torch.where(KEPT, value, math.inf)


def score(logits, weight=WEIGHT):
    values, classes = logits.topk(2)
    return (values[:, 0] - values[:, 1]) / (weight[classes[:, 0]] - weight[classes[:, 1]]).norm(
        dim=1
    )


def loss(logits):
    return F.cross_entropy(logits, TARGET, reduction="none")


def smallest(values):
    return values.topk(2, largest=False).values


def statistics(logits):
    p = logits.softmax(1)
    confidence = torch.where(KEPT, p.gather(1, LABEL[:, None]).squeeze(1), 1)
    entropy = torch.where(KEPT, -(p * p.log()).sum(1), 0)
    return torch.stack((finite(margin(logits)), loss(logits), confidence, entropy))


def fields(result):
    return torch.stack((finite(result.margin), result.loss, result.confidence, result.entropy))


def tempered(logits):
    values = statistics(logits / 0.7)
    return torch.stack((-values[1], values[3]))


def log_prob_and_entropy(features, weight):
    return torch.stack(
        marginops.linear_log_prob(
            features, weight, TARGET, BIAS, temperature=0.7, return_entropy=True
        )
    )


def moments(features):
    members = [features[label == TARGET] for label in range(CLASSES)]
    means = [rows.mean(0) for rows in members]
    squares = [
        (rows - mean).square().sum(1).mean() for rows, mean in zip(members, means, strict=True)
    ]
    # Three classes have one sample. Their radius is 0, and so is its gradient.
    return torch.cat((torch.stack(means).flatten(), squares[0].sqrt().reshape(1)))


def regularization(features, weight, logits):
    pair = LABEL[KEPT], rival_value(logits).indices[KEPT]
    distance = (weight[pair[0]] - weight[pair[1]]).norm(dim=1)
    return (features[KEPT].norm(dim=1).max() * distance.mean()).square()


def head(features):
    return F.linear(features, WEIGHT, BIAS)


def finite(values):
    return torch.where(values == math.inf, 0, values)


def class_moments(features):
    result = marginops.class_moments(features, TARGET, CLASSES)
    return torch.cat((result.mean.flatten(), result.radius[:1]))


def radius_area(margins):
    return torch.where(margins == math.inf, 0, margins).sum() / (margins != math.inf).sum()


# Name: the function, the same in plain PyTorch, and the shape of the argument.
CASES = {
    "classification_margin": (
        lambda x: finite(marginops.classification_margin(x, TARGET)),
        lambda x: finite(margin(x)),
        (ROWS, CLASSES),
    ),
    "classification_margin of log_norm": (
        lambda x: finite(marginops.classification_margin(LOGITS, TARGET, log_norm=x)),
        lambda x: finite(margin(LOGITS, x)),
        (),
    ),
    "minimal_margin_score": (
        lambda x: marginops.minimal_margin_score(x, WEIGHT),
        score,
        (ROWS, CLASSES),
    ),
    "minimal_margin_score of weight": (
        lambda x: marginops.minimal_margin_score(LOGITS, x),
        lambda x: score(LOGITS, x),
        (CLASSES, COLUMNS),
    ),
    "select_smallest": (lambda x: marginops.select_smallest(x, 2).scores, smallest, (ROWS,)),
    "select_minimal_margin": (
        lambda x: marginops.select_minimal_margin(x, WEIGHT, k=2).scores,
        lambda x: smallest(score(x)),
        (ROWS, CLASSES),
    ),
    "select_classification_margin": (
        lambda x: marginops.select_classification_margin(x, TARGET, 2).scores,
        lambda x: smallest(margin(x)),
        (ROWS, CLASSES),
    ),
    "sample_statistics": (
        lambda x: fields(marginops.sample_statistics(x, TARGET)),
        statistics,
        (ROWS, CLASSES),
    ),
    "mean_loss": (
        lambda x: marginops.sample_statistics(x, TARGET).mean_loss(),
        lambda x: F.cross_entropy(x, TARGET),
        (ROWS, CLASSES),
    ),
    "linear_classification_margin": (
        lambda x: finite(marginops.linear_classification_margin(x, WEIGHT, TARGET, BIAS)),
        lambda x: finite(margin(head(x))),
        (ROWS, COLUMNS),
    ),
    "linear_minimal_margin_score": (
        lambda x: marginops.linear_minimal_margin_score(x, WEIGHT, BIAS),
        lambda x: score(head(x)),
        (ROWS, COLUMNS),
    ),
    "linear_select_minimal_margin": (
        lambda x: marginops.linear_select_minimal_margin(x, WEIGHT, BIAS, k=2).scores,
        lambda x: smallest(score(head(x))),
        (ROWS, COLUMNS),
    ),
    "linear_select_classification_margin": (
        lambda x: marginops.linear_select_classification_margin(x, WEIGHT, TARGET, k=2).scores,
        lambda x: smallest(margin(F.linear(x, WEIGHT))),
        (ROWS, COLUMNS),
    ),
    "linear_sample_statistics": (
        lambda x: fields(marginops.linear_sample_statistics(x, WEIGHT, TARGET, BIAS)),
        lambda x: statistics(head(x)),
        (ROWS, COLUMNS),
    ),
    "linear_sample_statistics of weight": (
        lambda x: marginops.linear_sample_statistics(FEATURES, x, TARGET).loss,
        lambda x: loss(F.linear(FEATURES, x)),
        (CLASSES, COLUMNS),
    ),
    "linear_log_prob": (
        lambda x: log_prob_and_entropy(x, WEIGHT),
        lambda x: tempered(head(x)),
        (ROWS, COLUMNS),
    ),
    "linear_log_prob of weight": (
        lambda x: log_prob_and_entropy(FEATURES, x),
        lambda x: tempered(F.linear(FEATURES, x, BIAS)),
        (CLASSES, COLUMNS),
    ),
    "class_moments": (class_moments, moments, (ROWS, COLUMNS)),
    "multi_margin_regularization": (
        lambda x: marginops.multi_margin_regularization(x, WEIGHT, TARGET),
        lambda x: regularization(x, WEIGHT, F.linear(x, WEIGHT)),
        (ROWS, COLUMNS),
    ),
    "MultiMarginRegularization of weight": (
        lambda x: marginops.multi_margin_regularization(FEATURES, x, TARGET, logits=LOGITS),
        lambda x: regularization(FEATURES, x, LOGITS),
        (CLASSES, COLUMNS),
    ),
    "margin_area": (marginops.margin_area, radius_area, (ROWS,)),
}
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
    exempt = {"log_norm_product", "spectrally_normalized_margin", "support_vector_counts"}
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
