"""The rule of each operation, checked by scaling the parameters, and models without rates."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.homogeneous import Function, checked_rates, seeded
from marginops.homogeneity import NotQuasiHomogeneousError, rates

RULES = {
    "transposed": (lambda m, x: x @ m.w.t() @ m.w, {"w": 0.5}),
    "in place": (
        lambda m, x: (x @ m.w).add_(m.a).relu_() * m.b,
        {"w": 0.5, "a": 0.5, "b": 0.5},
    ),
    "in place on a view": (
        lambda m, x: _double_half(x @ m.w) @ m.w,
        {"w": 0.5},
    ),
    "quotient": (lambda m, x: x @ m.w / (m.a.abs() + m.b.square()), {"w": 1.0, "a": 0.0, "b": 0.0}),
    "reciprocal": (lambda m, x: (x @ m.w) ** 3 * (2 * m.a.abs()).rsqrt(), {"w": 1 / 3, "a": 0.0}),
    "power": (lambda m, x: (x @ m.w).pow(2) * m.a.abs() ** 0.5, {"w": 0.4, "a": 0.4}),
    "square root": (lambda m, x: ((x @ m.w).square() * m.a.abs()).sqrt(), {"w": 2 / 3, "a": 2 / 3}),
    "norm": (
        lambda m, x: (x @ m.w).norm(dim=1) + m.a.norm() + m.b.var(),
        {"w": 1.0, "a": 1.0, "b": 0.5},
    ),
    "product": (lambda m, x: m.a.prod() * x @ m.w, {"w": 0.2, "a": 0.2}),
    "clamp": (lambda m, x: (x @ m.w).clamp(min=0) + (x @ m.w).clamp_max(0.0) * 2, {"w": 1.0}),
    "bound": (lambda m, x: (x @ m.w).clamp(-1, 1) * m.a, {"w": 0.0, "a": 1.0}),
    "unit length": (
        lambda m, x: F.normalize(x @ m.w) * F.normalize(m.a, dim=0) * m.b,
        {"w": 0.0, "a": 0.0, "b": 1.0},
    ),
    "cosine": (
        lambda m, x: F.cosine_similarity(x @ m.w, m.a[None]) * m.b[0],
        {"w": 0.0, "a": 0.0, "b": 1.0},
    ),
    "mask": (lambda m, x: torch.where(x @ m.w > 0, x * m.a, -m.a) * m.w[0], {"w": 0.5, "a": 0.5}),
    "comparison": (lambda m, x: (x @ m.w > m.a) * (x * m.b), {"w": 0.0, "a": 0.0, "b": 1.0}),
    "masked fill": (
        lambda m, x: (x @ m.w).masked_fill(x < 0, -torch.inf).amax(1).relu() + m.a.sum(),
        {"w": 1.0, "a": 1.0},
    ),
    "sort": (
        lambda m, x: (x @ m.w).sort(1)[0] * m.a + (x @ m.w).topk(4)[0] * m.a,
        {"w": 0.5, "a": 0.5},
    ),
    "largest": (
        lambda m, x: (x @ m.w).max(1)[0] + torch.maximum(m.a, m.b).max(),
        {"w": 1.0, "a": 1.0, "b": 1.0},
    ),
    "lookup": (lambda m, x: m.w[(x[:, 0] > 0).long()] * m.a, {"w": 0.5, "a": 0.5}),
    "split": (lambda m, x: sum((x @ m.w).chunk(2, 1)) * m.a.split(2)[0], {"w": 0.5, "a": 0.5}),
    "zeros": (
        lambda m, x: torch.stack([x @ m.w, x.new_zeros(3, 4), torch.zeros(3, 4).double()]),
        {"w": 1.0},
    ),
    "constant zero": (
        lambda m, x: torch.where(x > 0, x @ m.w, torch.tensor(0.0).double()),
        {"w": 1.0},
    ),
    "zero as index": (lambda m, x: (x @ m.w)[torch.zeros(2).long()], {"w": 1.0}),
    "distance": (lambda m, x: torch.cdist(x @ m.w, m.a[None]), {"w": 1.0, "a": 1.0}),
    "counts": (  # torch cannot differentiate these
        lambda m, x: (_counts(torch.cdist, x @ m.w) + _counts(torch.dist, m.a)) * m.b[0],
        {"w": 0.0, "a": 0.0, "b": 1.0},
    ),
    "constants": (
        lambda m, x: (torch.sin(x) @ m.w) * torch.softmax(x, 1) / (1 + x.square()),
        {"w": 1.0},
    ),
    "constant beside": (lambda m, x: (x @ m.w + 1).relu() @ m.v, {"w": 0.0, "v": 1.0}),
    "einsum": (lambda m, x: torch.einsum("ni,ij,j->nj", x, m.w, m.a), {"w": 0.5, "a": 0.5}),
    "addmm": (
        lambda m, x: torch.addmm(m.a, x, m.w) + torch.addcmul(m.a, m.b, m.w[0]),
        {"w": 1.0, "a": 1.0, "b": 0.0},
    ),
    "bilinear": (
        lambda m, x: F.bilinear(x, x * m.a, m.w[None], m.b[:1]),
        {"w": 0.5, "a": 0.5, "b": 1.0},
    ),
    "prelu": (lambda m, x: F.prelu(x @ m.w, m.a), {"w": 1.0, "a": 0.0}),
    "threshold": (lambda m, x: F.threshold(x @ m.w, 0, 0), {"w": 1.0}),
    "interpolation": (
        lambda m, x: F.interpolate(F.pad((x @ m.w)[None], (1, 1)), scale_factor=2, mode="linear"),
        {"w": 1.0},
    ),
    "grid": (
        lambda m, x: F.grid_sample((x @ m.w)[None, None], x[None, None, :, :2], align_corners=True),
        {"w": 1.0},
    ),
    "lerp": (lambda m, x: torch.lerp(x @ m.w, m.a, m.b), {"w": 1.0, "a": 1.0, "b": 0.0}),
    "other dtype": (lambda m, x: (x @ m.w).to(torch.complex128).abs(), {"w": 1.0}),
    "no gradient": (lambda m, x: _without_gradient(x) @ m.w, {"w": 1.0}),
}


def _double_half(x):
    x[:, :2].mul_(2.0)
    return x


def _counts(distance, x):
    return distance(x.detach(), 2 * x.detach(), p=0)


def _without_gradient(x):
    with torch.no_grad():
        return x * 2


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    function, expected = RULES[name]
    shapes = {"w": (4, 4), "v": (4, 4), "a": (4,), "b": (4,)}
    model = Function(function, **{key: shapes[key] for key in expected})
    found = checked_rates(model, torch.randn(3, 4, dtype=torch.float64))
    assert found == pytest.approx(expected, abs=1e-15)


class Inner(nn.Module):
    """A layer and then a function, so that messages have a path."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


class First(nn.Module):
    def forward(self, x):
        return x[0]


NEVER = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "erf": torch.erf,
    "exp": torch.exp,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "elu": F.elu,
    "softplus": F.softplus,
    "logsumexp": lambda x: x.logsumexp(1),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_not_quasi_homogeneous_is_named_with_its_place(name):
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Inner(NEVER[name])))
    message = rf"^rates: {name} at 1\.0 \(Inner\) in `.*` is not quasi-homogeneous$"
    with pytest.raises(NotQuasiHomogeneousError, match=message):
        rates(network, torch.randn(3, 4))


def test_a_module_of_torch_is_named_by_its_path():
    network = nn.ModuleDict({"act": nn.Tanh()})
    model = Function(lambda m, x: m.layer["act"](x * m.a), a=(4,))
    model.layer = network
    message = r"^rates: tanh at layer\.act \(torch\.nn\.Tanh\) is not quasi-homogeneous$"
    with pytest.raises(NotQuasiHomogeneousError, match=message):
        rates(model, torch.randn(3, 4).double())
    with pytest.raises(NotQuasiHomogeneousError, match=r"lstm at 0 \(torch\.nn\.LSTM\)"):
        rates(nn.Sequential(nn.LSTM(4, 3), First()), torch.randn(3, 4))
    encoder = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    with pytest.raises(NotQuasiHomogeneousError, match="scaled_dot_product_attention at self_attn"):
        rates(encoder, torch.randn(1, 3, 4))


FAILURES = {
    "unknown": (
        lambda m, x: torch.cumprod(x * m.a, 1),
        "cumprod at the model .* has no rule",
    ),
    "rounding": (lambda m, x: m.w[(x * m.a).long()[:, 0] * 0], "rounds"),
    "floor": (lambda m, x: torch.div(x * m.a, 2, rounding_mode="floor"), "div at .* rounds"),
    "exponent": (lambda m, x: 2 ** (x * m.a), "pow at .* needs a number"),
    "constant at the end": (lambda m, x: x * m.a + 1, "add at .* same rate when the output has"),
    "two rates": (lambda m, x: x * m.a + x * m.a * m.a, "add at .* same rate when the output has"),
    "no growth": (lambda m, x: x * m.a / m.a.norm(), "the output, div at .* does not grow"),
    "no parameter": (lambda m, x: x.relu(), "the output, relu at .* does not depend"),
    "zero": (lambda m, x: x.new_zeros(3) * m.a[0], "the output, mul at .* does not depend"),
    "slope": (lambda m, x: F.prelu(x * m.a, m.a), "prelu at .* weight must have rate 0"),
    "inverse": (lambda m, x: x / m.a, "the output, div at .* does not grow"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_name_an_operation(name):
    function, message = FAILURES[name]
    with pytest.raises(NotQuasiHomogeneousError, match=f"^rates: .*{message}"):
        rates(Function(function, a=(4,), w=(4, 4)), torch.randn(3, 4).double())


def test_the_first_impossible_operation_is_named():
    # The first sum is possible if its input has rate 0; then the second sum is not.
    network = Function(lambda m, x: torch.log1p(x) * m.a + 1, a=(4,))
    chain = nn.Sequential(network, nn.ReLU(), nn.Linear(4, 4).double(), Inner(lambda x: x + 1))
    with pytest.raises(NotQuasiHomogeneousError, match=r"^rates: add at 3 \(Inner\)"):
        rates(chain.double(), torch.rand(3, 4).double())


def test_running_statistics_hold_their_input_at_rate_0():
    class Twice(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4, bias=False), norm

        def forward(self, x):
            return self.linear(self.norm(self.linear(x)))

    message = r"batch_norm\S* at norm \(torch\.nn\.BatchNorm1d\): its input must have rate 0"
    with pytest.raises(NotQuasiHomogeneousError, match=message):
        rates(Twice(nn.BatchNorm1d(4, affine=False)), torch.randn(3, 4))
    # Statistics of the batch itself grow with the input, so this network has rates.
    free = seeded(Twice(nn.BatchNorm1d(4, affine=False, track_running_stats=False)))
    free.norm.eps = 1e-30
    assert checked_rates(free, torch.randn(3, 4, dtype=torch.float64)) == {"linear.weight": 1.0}


def test_wrong_models_and_inputs():
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got function"):
        rates(lambda x: x, x)
    with pytest.raises(
        TypeError, match=r"^example_input: expected a tensor or a tuple .* got list"
    ):
        rates(linear, [x])
    with pytest.raises(ValueError, match=r"^model: expected at least one parameter, got none"):
        rates(nn.ReLU(), x)
    for function, kind in (
        (lambda x: (x, x), "tuple"),
        (lambda x: (x,), "tuple"),
        (lambda x: {"scores": x}, "dict"),
    ):
        with pytest.raises(ValueError, match=rf"^model: expected one tensor as output, got {kind}"):
            rates(Inner(function), x)
    with pytest.raises(ValueError, match=r"a floating-point output, got torch\.int64"):
        rates(Inner(lambda x: x.argmax(1)), x)
    with pytest.raises(RuntimeError, match=r"^rates: torch\.export cannot trace") as caught:
        rates(Inner(lambda x: x if x.sum() > 0 else -x), x)
    assert caught.value.__cause__ is not None
    with pytest.raises(RuntimeError, match=r"^rates: torch\.export cannot trace"):
        rates(linear, torch.randn(3, 5))
    aliased = nn.Linear(4, 4)
    aliased.register_buffer("alias", aliased.weight.detach())
    model = Function(lambda m, x: m.layer(x) @ m.layer.alias, a=())
    model.layer = aliased.double()
    with pytest.raises(ValueError, match=r"got 'layer\.alias' in the memory of a parameter"):
        model.layer.alias = model.layer.weight.detach()
        rates(model, x.double())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight.data = tied[0].weight.data
    with pytest.raises(ValueError, match=r"got '1\.weight' in the memory of '0\.weight'"):
        rates(tied, x)


def test_missing_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'pip install "marginops\[homogeneity\]"'):
        rates(nn.Linear(4, 4), torch.randn(3, 4))
