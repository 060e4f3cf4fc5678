"""Seminorm, scale and margins over it: closed forms, a root finder, derivatives, flow."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import brentq
from torch import nn

import marginops
from helpers.homogeneous import seeded
from marginops.homogeneity import lambda_seminorm, log_scale, rates, rescale

VERSIONS = "tau", "lambda_max"
FUNCTIONS = {
    "lambda_seminorm": lambda_seminorm,
    "log_scale": log_scale,
    "log_scale, lambda_max": lambda p, r: log_scale(p, r, version="lambda_max"),
    "rescale": lambda p, r: rescale(p, r, 1.0),
}


def over_scale(margins, parameters, given_rates, version="tau"):
    """Margins divided by the scale. The logits are the margins, and 0 for the other class."""
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    target = torch.zeros(len(margins), dtype=torch.int64)
    log_norm = log_scale(parameters, given_rates, version=version)
    return marginops.classification_margin(logits, target, log_norm=log_norm)


def scale_by_bisection(parameters, given_rates):
    """The root of the logarithm of the sum, by bisection over single numbers."""
    terms = [
        (rate, math.log(rate) + 2 * math.log(abs(number)))
        for name, rate in given_rates.items()
        for number in parameters[name].flatten().tolist()
        if rate > 0 and number != 0
    ]

    def function(tau):
        exponents = [offset - 2 * tau * rate for rate, offset in terms]
        top = max(exponents)
        return top + math.log(math.fsum(math.exp(e - top) for e in exponents))

    low, high = -1.0, 1.0
    while function(low) < 0:
        low *= 2
    while function(high) > 0:
        high *= 2
    return brentq(function, low, high, xtol=1e-15, rtol=1e-15)


cases = st.lists(
    st.tuples(
        st.sampled_from([0.0, 1e-3, 0.1, 1 / 3, 0.5, 0.999, 1.0, 1.0, 7.0]),
        st.sampled_from([1e-290, 1e-150, 1e-8, 0.3, 1.0, 5.0, 1e8, 1e150, 1e290]),
    ),
    min_size=1,
    max_size=6,
).filter(lambda pairs: any(rate > 0 for rate, _ in pairs))


@settings(max_examples=60)
@given(cases)
def test_scale_is_the_root(pairs):
    generator = torch.Generator().manual_seed(len(pairs))
    parameters = {
        str(i): torch.randn(3, generator=generator, dtype=torch.float64) * size
        for i, (_, size) in enumerate(pairs)
    }
    given_rates = {str(i): rate for i, (rate, _) in enumerate(pairs)}
    expected = scale_by_bisection(parameters, given_rates)
    found = log_scale(parameters, given_rates).item()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_closed_forms():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    # One rate: lambda e^{-2 tau lambda} S = 1.
    square = (a.square().sum() + b.square().sum()).item()
    for depth in (1, 2, 5):
        found = log_scale({"a": a, "b": b}, {"a": 1 / depth, "b": 1 / depth})
        assert found.item() == pytest.approx(depth / 2 * math.log(square / depth), rel=1e-14)
    # Rates 1 and 1/2: a quadratic in e^{-tau}.
    s1, s2 = a.square().sum().item(), b.square().sum().item() / 2
    z = (-s2 + math.sqrt(s2 * s2 + 4 * s1)) / (2 * s1)
    found = log_scale({"a": a, "b": b}, {"a": 1.0, "b": 0.5})
    assert found.item() == pytest.approx(-math.log(z), rel=1e-14)
    seminorm = lambda_seminorm({"a": a, "b": b}, {"a": 1.0, "b": 0.5})
    assert seminorm.item() == pytest.approx(math.sqrt(s1 + s2), rel=1e-15)
    largest = lambda_seminorm({"a": a, "b": b}, {"a": 0.25, "b": 0.5}, largest_only=True)
    assert largest.item() == pytest.approx(math.sqrt(s2), rel=1e-15)


def test_scale_one_is_seminorm_one():
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    found = rates(model, torch.zeros(1, 4, dtype=torch.float64))
    rescale(model, found, -log_scale(model, found))
    assert log_scale(model, found).item() == pytest.approx(0, abs=1e-14)
    assert lambda_seminorm(model, found).item() == pytest.approx(1, rel=1e-14)


def test_margins_do_not_depend_on_the_scale():
    model = seeded(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    found = rates(model, x)

    def both():
        norms = [log_scale(model, found, version=version) for version in VERSIONS]
        logits = model(x)
        return [
            marginops.classification_margin(logits, target, log_norm=norm) for norm in norms
        ], marginops.classification_margin(logits, target)

    before, plain = both()
    expected = plain * math.exp(-log_scale(model, found).item())
    torch.testing.assert_close(before[0], expected, rtol=1e-13, atol=0)
    top = lambda_seminorm(model, found, largest_only=True).item()
    torch.testing.assert_close(before[1], plain / top, rtol=1e-13, atol=0)
    rescale(model, found, 2.5)
    after, grown = both()
    torch.testing.assert_close(grown, plain * math.exp(2.5), rtol=1e-12, atol=0)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_largest_rate_other_than_one():
    parameters = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([9.0])}
    found = log_scale(parameters, {"a": 0.5, "b": 0.25}, version="lambda_max")
    # The seminorm is sqrt(0.5 * 25); its power 1 / 0.5 is 12.5.
    assert found.item() == pytest.approx(math.log(12.5), rel=1e-15)


def test_derivatives():
    generator = torch.Generator().manual_seed(3)
    a, b, c, q = (
        torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(4)
    )
    given_rates = {"a": 1.0, "b": 0.5, "c": 1 / 3}

    def scale(a, b, c):
        return log_scale({"a": a, "b": b, "c": c}, given_rates)

    assert torch.autograd.gradcheck(scale, (a, b, c))
    assert torch.autograd.gradgradcheck(scale, (a, b, c))

    def first_derivative_twice(a):
        gradient = torch.autograd.grad(scale(a, b, c), a, create_graph=True)[0]
        return torch.autograd.grad(gradient.sum(), a, create_graph=True)[0]

    assert torch.autograd.gradcheck(first_derivative_twice, (a,))
    for version in VERSIONS:

        def margins(q, a, b, version=version):
            return over_scale(q, {"a": a, "b": b, "c": c}, given_rates, version)

        assert torch.autograd.gradcheck(margins, (q, a, b))
    # In the direction of the rates the scale grows by 1: <grad tau, Lambda theta> = 1.
    gradients = torch.autograd.grad(scale(a, b, c), (a, b, c))
    values = zip(given_rates.values(), gradients, (a, b, c), strict=True)
    along = sum(rate * (gradient * value).sum() for rate, gradient, value in values)
    assert along.item() == pytest.approx(1, rel=1e-12)


def test_parameters_that_are_zero():
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    one = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    scale = log_scale({"zero": zero, "one": one}, {"zero": 0.5, "one": 1.0})
    assert scale.item() == pytest.approx(math.log(2), rel=1e-15)
    gradients = torch.autograd.grad(scale, (zero, one), create_graph=True)
    assert gradients[0].tolist() == [0, 0]
    # d tau / d theta = lambda e^{-2 tau lambda} theta / (sum lambda^2 e^{-2 tau lambda} theta^2).
    second = torch.autograd.grad(gradients[0].sum(), zero)[0]
    torch.testing.assert_close(second, torch.full_like(second, 0.5 * math.exp(-math.log(2))))
    # This holds even if the factor e^{-2 tau lambda} of the zero overflows.
    small = {"zero": zero.detach(), "one": one.detach() * 1e-20}
    found = log_scale(small, {"zero": 100.0, "one": 1.0})
    assert found.item() == pytest.approx(math.log(2e-20), rel=1e-15)
    seminorm = lambda_seminorm({"zero": zero}, {"zero": 1.0})
    assert seminorm.item() == 0
    assert torch.autograd.grad(seminorm, zero)[0].tolist() == [0, 0]
    for version in VERSIONS:
        with pytest.raises(ValueError, match=r"^parameters: .* got a seminorm of 0"):
            log_scale({"zero": zero, "one": one}, {"zero": 0.5, "one": 0.0}, version=version)
    with pytest.raises(ValueError, match=r"^parameters: .* got a seminorm of 0"):
        log_scale({"zero": zero, "one": one}, {"zero": 1.0, "one": 0.5}, version="lambda_max")


def test_nan_and_infinity_propagate():
    for number in (math.nan, math.inf):
        parameters = {"a": torch.tensor([number, 1.0]), "b": torch.ones(2)}
        given_rates = {"a": 1.0, "b": 0.5}
        for function in (lambda_seminorm, log_scale):
            found = function(parameters, given_rates)
            torch.testing.assert_close(found.item(), number, equal_nan=True)
        # A parameter with rate 0 does not count.
        assert math.isfinite(log_scale(parameters, {"a": 0.0, "b": 0.5}).item())
    margins = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    found = over_scale(margins, {"a": torch.tensor([2.0])}, {"a": 1.0})
    torch.testing.assert_close(found, margins / 2, equal_nan=True)


def test_factor_beyond_the_range_of_numbers():
    # e^{-tau} is 1e-400 and 1e400, but the results are within range.
    for tiny, margin in ((1e-40, 1e-300), (1e40, 1e300)):
        parameters = {"a": torch.tensor([1 / tiny], dtype=torch.float64)}
        margins = torch.tensor([1 / margin], dtype=torch.float64)
        found = over_scale(margins, parameters, {"a": 0.1}, "lambda_max")
        log10 = math.log10(1 / margin) - 10 * (0.5 * math.log10(0.1) + math.log10(1 / tiny))
        assert math.log10(found.item()) == pytest.approx(log10, rel=1e-13)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtypes(dtype):
    parameters = {"a": torch.tensor([2.0], dtype=dtype)}
    margins = torch.tensor([6.0, -2.0], dtype=dtype)
    found = over_scale(margins, parameters, {"a": 1.0})
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx([3.0, -1.0], rel=1e-6)
    assert log_scale(parameters, {"a": 1.0}).dtype == torch.float64
    assert over_scale(margins[:0], parameters, {"a": 1.0}).shape == (0,)


def test_rescale_leaves_rate_0_alone_and_keeps_dtypes():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).bfloat16())
    model[0].bias.data[0] = math.nan
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    names = list(before)
    given_rates = dict(zip(names, [0.5, 0.0, 1.0, 2.0], strict=True))
    rescale(model, given_rates, math.log(4))
    for (name, value), factor in zip(model.named_parameters(), [2, 1, 4, 16], strict=True):
        torch.testing.assert_close(value.detach(), before[name] * factor, equal_nan=True)
        assert value.requires_grad and value.grad_fn is None


def test_the_margin_of_the_toy_flow_at_scale_one_falls_in_the_end():
    # f = t1 x1 + t2 t3 x2. t1 has the largest rate and vanishes, since it is not needed. At scale 1
    # and with t2 = t3 the margin is t1 x1 + (1 - t1^2) x2. It is largest at t1 = x1 / (2 x2), not
    # in the limit t1 = 0.
    numbers = torch.tensor([0.5, 0.2, 0.2], dtype=torch.float64)
    given_rates = {"a": 1.0, "b": 0.5, "c": 0.5}
    history = []
    for _ in range(400):
        a, b, c = (number.requires_grad_() for number in numbers.unbind())
        margin = a * 0.1 + b * c * 1.0
        named = {"a": a.detach(), "b": b.detach(), "c": c.detach()}
        history.append(over_scale(margin.detach()[None], named, given_rates).item())
        gradient = torch.stack(torch.autograd.grad(margin, (a, b, c)))
        numbers = (numbers + 0.05 * gradient).detach()
    assert history[0] < 0.5
    assert max(history) == pytest.approx(1.0025, abs=1e-4)
    assert history[-1] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_arguments(name):
    function = FUNCTIONS[name]
    linear = nn.Linear(2, 2)
    good = {"weight": 1.0, "bias": 0.5}
    for given_rates, message in (
        ({"weight": 1.0}, r"expected a rate for every parameter, got none for \['bias'\]"),
        ({**good, "other": 1.0}, r"expected only names of parameters, got \['other'\]"),
        ({**good, "bias": -0.5}, r"expected a finite rate >= 0 for 'bias', got -0\.5"),
        ({**good, "bias": math.nan}, r"expected a finite rate >= 0 for 'bias', got nan"),
        ({**good, "bias": math.inf}, r"expected a finite rate >= 0 for 'bias', got inf"),
    ):
        with pytest.raises(ValueError, match=f"^rates: {message}"):
            function(linear, given_rates)
    with pytest.raises(TypeError, match=r"^rates: expected a number for 'bias', got str"):
        function(linear, {**good, "bias": "1"})
    with pytest.raises(TypeError, match=r"^rates: expected a mapping of names, got list"):
        function(linear, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"^parameters: expected at least one"):
        function(nn.ReLU(), {})
    if name == "rescale":
        with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got dict"):
            function({"a": torch.ones(1)}, {"a": 1.0})
        for alpha, error in ((math.nan, ValueError), ("1", TypeError), (True, TypeError)):
            with pytest.raises(error, match=r"^alpha: expected a"):
                rescale(linear, good, alpha)
        before = linear.bias.tolist()
        with pytest.raises(ValueError, match=r"^alpha: .* in the range of float64, got 1000\.0"):
            rescale(linear, {"weight": 1.0, "bias": 0.5}, 1000.0)
        assert linear.bias.tolist() == before
        return
    for parameters, message in (
        ({"a": 1.0}, "a tensor for 'a', got float"),
        ({"a": torch.ones(1, dtype=torch.int64)}, "a floating-point dtype for 'a'"),
        ([torch.ones(1)], r"a torch\.nn\.Module or a mapping .* got list"),
    ):
        with pytest.raises(TypeError, match=f"^parameters: expected {message}"):
            function(parameters, {"a": 1.0})


def test_wrong_version():
    with pytest.raises(ValueError, match=r'^version: expected "tau" or "lambda_max", got \'max\''):
        log_scale({"a": torch.ones(1)}, {"a": 1.0}, version="max")
