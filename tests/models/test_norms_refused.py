"""log_norm_product: models and options that it refuses or warns about."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from helpers.models_for_norms import Function
from marginops.norms import log_norm_product
from marginops.norms.layers import keeps_scale


class Branching(nn.Module):
    """A model that torch.fx cannot trace."""

    def __init__(self, *others) -> None:
        super().__init__()
        self.layer, self.others = nn.Linear(3, 3), nn.Sequential(*others)

    def forward(self, x):
        if x.sum() > 0:
            x = torch.relu(self.layer(x))
        return self.others(self.layer(x))


def test_what_cannot_be_traced():
    model = Branching()
    one = log_norm_product(model.layer)
    with pytest.warns(UserWarning, match=r"once for each name .* torch.fx cannot trace"):
        assert log_norm_product(model) == one
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twice = log_norm_product(model, example_input=torch.ones(1, 3))
        torch.testing.assert_close(twice, 2 * one)
        torch.testing.assert_close(log_norm_product(model, example_input=-torch.ones(1, 3)), one)
    with pytest.raises(ValueError, match=r'torch.fx can trace .* use batch_norm="last"'):
        log_norm_product(Branching(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    with pytest.warns(UserWarning, match=r"torch.fx cannot trace"):
        log_norm_product(Branching(nn.BatchNorm1d(3), nn.Linear(3, 2)), batch_norm="last")


@pytest.mark.parametrize(
    ("model", "place"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), r"1 \(torch.nn.Tanh\)"),
        (nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.GELU())), r"0.1 \(torch.nn.GELU\)"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), r"1 \(torch.nn.LayerNorm\)"),
        (nn.Sequential(Function(lambda m, x: F.silu(m.layer(x)))), r"0 \(function silu\)"),
        (Function(lambda m, x: m.layer(x).sigmoid()), r"the model itself \(function sigmoid\)"),
        (Function(lambda m, x: m.layer(x).tanh_()), r"the model itself \(function tanh_\)"),
        (Function(lambda m, x: F.logsigmoid(m.layer(x))), r".* \(function log_sigmoid\)"),
        (Function(lambda m, x: m.layer(x) ** 2), r".* \(function pow\)"),
        (
            Function(lambda m, x: F.batch_norm(m.layer(x), x[0], x[0])),
            r".* \(function batch_norm\)",
        ),
    ],
)
def test_what_breaks_homogeneity_is_named(model, place):
    with pytest.warns(UserWarning, match=f"depend on the scale of the layers, because of {place}"):
        log_norm_product(model)


def test_what_keeps_the_scale_is_not_named():
    parts = nn.PReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Dropout(), nn.Identity()
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3), *parts, nn.Linear(4, 3), Function(lambda m, x: m.layer(x).relu())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_norm_product(model)
        log_norm_product(
            nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)), batch_norm="last"
        )
    head = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)
    with pytest.warns(UserWarning, match=r"because of .*1 \(torch.nn.LayerNorm\), 3 \(torch.nn.T"):
        log_norm_product(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), *head), batch_norm="last")


PADS = nn.ZeroPad2d(1), nn.ConstantPad2d(1, 1.0), nn.CircularPad2d(1), nn.ReflectionPad2d(1)
POOLS = nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, 2)
NORMALIZATIONS = (
    *(nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)),
    *(nn.RMSNorm(4), nn.LocalResponseNorm(2), nn.CrossMapLRN2d(2, 1.0)),
)
ACTIVATIONS = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Mish),
    *(nn.LogSigmoid, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax2d, nn.Softplus, nn.Tanh),
    *(nn.Softshrink, nn.Softsign, nn.Tanhshrink, nn.GLU, nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU),
)
SHAPES = nn.Flatten(), nn.PixelShuffle(2), nn.ChannelShuffle(2), nn.Upsample(8), nn.Dropout()
SOFTMAXES = nn.Softmax(1), nn.Softmin(1), nn.LogSoftmax(1), nn.Threshold(0.1, 0.0)


@pytest.mark.parametrize(
    "module",
    [*PADS, *POOLS, *NORMALIZATIONS, *(kind() for kind in ACTIVATIONS), *SHAPES, *SOFTMAXES],
    ids=lambda module: type(module).__name__,
)
def test_the_name_of_a_module_tells_whether_it_keeps_the_scale(module):
    module, x = module.eval(), 4 * torch.randn(2, 4, 6, 4)

    def output(x):
        torch.manual_seed(0)
        return module(x)

    with torch.no_grad():
        is_scaled = torch.allclose(output(2 * x), 2 * output(x))
    assert keeps_scale(module) == is_scaled


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(2, 2), nn.Parameter(torch.ones(2))


def borrow(model, x):
    return F.linear(model.layer(x.to(model.layer.weight.dtype)), model.layer.weight)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class OwnNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


def pruned():
    layer = nn.Linear(2, 2)
    prune.identity(layer, "weight")
    return layer


NORM = nn.BatchNorm1d(2)


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        (nn.ReLU(), {}, "model: expected at least one linear layer or convolution, got ReLU"),
        (nn.Sequential(), {}, "without any"),
        (nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), {}, r"got 0 \(torch.nn.Embedding\)"),
        (nn.Bilinear(2, 2, 2), {}, r"Bilinear\) with weight, bias"),
        (nn.MultiheadAttention(4, 2), {}, "MultiheadAttention"),
        (nn.Sequential(nn.LSTM(2, 2)), {}, r"0 \(torch.nn.LSTM\)"),
        (Owner(), {}, r"Owner\) with gain"),
        (Function(borrow), {}, "parameters to be used by their own module only, got layer.w"),
        (Function(lambda m, x: m.layer(x) @ m.layer.weight.T), {}, r"their own .* layer.weight"),
        (Own(2, 2), {}, r"test_norms_refused.Own\) with weight, bias"),
        (nn.Sequential(nn.Linear(2, 2), OwnNorm(2)), {}, r"1 \(.*OwnNorm\) with weight, bias"),
        (pruned(), {}, "as the only parameters .* got bias, weight_orig"),
        (nn.Linear(2, 2, device="meta"), {}, "to have values, got a tensor on the meta device"),
        (nn.LazyLinear(2), {}, "to be initialized"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.ReLU(), NORM),
            {},
            r"2 \(.*after no layer; use batch_norm",
        ),
        (nn.Sequential(nn.Linear(3, 3), NORM), {}, "with 2 features after 0 with 3 outputs"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)),
            {},
            "with running statistics",
        ),
        (nn.Sequential(nn.Linear(2, 2), NORM), {"batch_norm": "last"}, "follows the last layer"),
        (
            nn.Linear(2, 2),
            {"batch_norm": "none"},
            'batch_norm: expected "fold", "last" or "affine"',
        ),
        (nn.Linear(2, 2), {"norm": "nuclear"}, 'norm: expected "frobenius" or "spectral"'),
        (nn.Linear(2, 2), {"conv": "fft"}, 'conv: expected "flattened" or "operator"'),
        (nn.Linear(2, 2), {"conv": "operator"}, "example_input: expected an input of the model"),
        (nn.Linear(2, 2), {"tolerance": 0.0}, "tolerance: expected a float between 0 and 1"),
    ],
)
def test_what_is_refused(model, how, message):
    with pytest.raises(ValueError, match=message):
        log_norm_product(model, **how)


def test_a_batch_norm_of_an_output_that_is_used_elsewhere_too():
    model = Function(lambda m, x: (lambda y: y + m.norm(y))(m.layer(x)))
    model.norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match=r"norm .* whose output has other uses"):
        log_norm_product(model)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        log_norm_product({})
    with pytest.raises(TypeError, match=r"example_input: expected a tensor or a tuple"):
        log_norm_product(nn.Linear(2, 2), conv="operator", example_input=[1.0])
    with pytest.raises(TypeError, match=r"real floating-point dtype, got torch.complex64"):
        log_norm_product(nn.Linear(2, 2, dtype=torch.complex64))
