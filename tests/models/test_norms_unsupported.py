"""log_norm_product: layers that compute something else than their weights suggest."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.models_for_norms import Function
from marginops.norms import log_norm_product, log_spectral_complexity


def frobenius(*weights: torch.Tensor) -> float:
    return sum(weight.detach().double().norm().log().item() for weight in weights)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


class Adapted(nn.Module):
    """A layer with low-rank adapters, as in Hu et al. (2021)."""

    def __init__(self, base: nn.Linear, is_cast: bool = False) -> None:
        super().__init__()
        self.base_layer, self.is_cast = base, is_cast
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.dropout = nn.Dropout(0.1)
        self.merged_adapters: list[str] = []

    def forward(self, x, *args, **kwargs):
        result = self.base_layer(x, *args, **kwargs)
        for name in self.lora_A:
            if name in self.merged_adapters:
                continue
            if self.is_cast and x.dtype != self.lora_A[name].weight.dtype:
                x = x.to(self.lora_A[name].weight.dtype)
            result = result + self.lora_B[name](self.lora_A[name](self.dropout(x))) * 0.5
        return result.to(x.dtype)

    def merge(self) -> None:
        delta = self.lora_B["default"].weight @ self.lora_A["default"].weight
        self.base_layer.weight.data += 0.5 * delta
        self.merged_adapters.append("default")


class Wrapper(nn.Module):
    """Takes any arguments, as wrappers of packages do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("is_cast", [False, True])
def test_adapters_have_to_be_merged(is_cast):
    model = nn.Sequential(Adapted(nn.Linear(4, 5), is_cast), nn.ReLU(), nn.Linear(5, 3))
    message = r"the sum of 0.base_layer and 0.lora_A.default, .* act as one matrix; .*merge_and_un"
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        log_norm_product(model)
    with pytest.raises(ValueError, match=r"model.0.base_layer and model.0.lora_A.default"):
        log_norm_product(Wrapper(model))
    with pytest.raises(ValueError, match="act as one matrix"):
        log_spectral_complexity(model)
    model[0].merge()
    expected = frobenius(model[0].base_layer.weight, model[2].weight)
    assert log_norm_product(model).item() == pytest.approx(expected, rel=1e-6)
    assert log_norm_product(Wrapper(model)).item() == pytest.approx(expected, rel=1e-6)
    model[0].merged_adapters.clear()
    with pytest.raises(ValueError, match="act as one matrix"):
        log_norm_product(model)


class Convolutions(nn.Module):
    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.wide, self.narrow, self.last = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), last
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        out = self.wide(x)
        out += self.last(self.norm(self.narrow(F.dropout(x, 0.1, training=self.training))))
        return out


def test_parallel_layers_are_one_matrix():
    with pytest.raises(ValueError, match="the sum of wide and narrow"):
        log_norm_product(Convolutions(nn.Conv2d(2, 2, 1)))
    # With an activation between its layers, the branch is that of a residual network.
    between = Convolutions(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1)))
    parts = between.wide.weight, between.narrow.weight / math.sqrt(1 + 1e-5), between.last[1].weight
    assert log_norm_product(between).item() == pytest.approx(frobenius(*parts), abs=1e-5)
    skip = Function(lambda m, x: (lambda y: y + m.other(y))(x + m.layer(x)))
    skip.other = nn.Linear(3, 3)
    expected = frobenius(skip.layer.weight, skip.other.weight)
    assert log_norm_product(skip).item() == pytest.approx(expected, abs=1e-6)
    twins = Function(lambda m, x: m.layer(x[:1]) - m.layer(x[1:]))
    assert log_norm_product(twins).item() == pytest.approx(
        2 * frobenius(twins.layer.weight), abs=1e-6
    )


class Held(Function):
    """A function with further attributes."""

    def __init__(self, function, **held) -> None:
        super().__init__(function)
        for name, value in held.items():
            setattr(self, name, value)


def with_buffers(model: nn.Module, **buffers) -> nn.Module:
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Held(lambda m, x: m.matrix @ m.layer(x).T, matrix=torch.eye(3)), "matrix"),
        (Held(lambda m, x: m.layer(x) @ m.matrix.T, matrix=torch.eye(3)), "_tensor_constant0"),
        (Held(lambda m, x: m.layer(x) @ torch.from_numpy(m.w), w=np.eye(3, dtype="f")), "_tensor"),
        (with_buffers(Held(lambda m, x: F.linear(m.layer(x), m.w)), w=torch.eye(3)), "w"),
        (
            with_buffers(
                Held(lambda m, x: F.linear(m.layer(x), m.w.to(x.dtype) * m.scale)),
                w=torch.eye(3).to(torch.int8),
                scale=torch.ones(3, 1),
            ),
            "w",
        ),
        (
            Wrapper(with_buffers(Held(lambda m, x: torch.mm(m.layer(x), m.w)), w=torch.eye(3))),
            "model.w",
        ),
    ],
)
def test_matrices_outside_layers(model, name):
    with pytest.raises(ValueError, match=f"^model: .* weight of a layer, got {name}.*, which is u"):
        log_norm_product(model)


class Branching(nn.Module):
    """A model that torch.fx cannot trace."""

    def __init__(self, inner: nn.Module, **held) -> None:
        super().__init__()
        self.inner = inner
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    "model",
    [
        Branching(nn.Linear(4, 4), hidden=[nn.Linear(4, 4)]),
        Branching(nn.Linear(4, 4), hidden={"a": (torch.eye(4),)}),
        Branching(nn.Linear(4, 4), hidden=np.eye(4)),
        with_buffers(Branching(nn.Linear(4, 4)), hidden=torch.eye(4)),
        with_buffers(Branching(nn.Linear(4, 4)), hidden=torch.eye(4).to(torch.int8)),
        Held(lambda m, x: m.hidden[0](m.layer(x)), hidden=[nn.Linear(3, 3)]),
    ],
)
def test_weights_that_a_model_without_graph_may_hide(model):
    with pytest.raises(ValueError, match=r"^model: .* got the model itself .* with hidden, which"):
        log_norm_product(model)


def test_what_a_model_without_graph_may_hold():
    inner = mlp()
    model = Branching(inner, order=[inner[0], inner[2]])
    with_buffers(
        model,
        mask=torch.ones(4, 4) > 0,
        ids=torch.arange(4).view(1, 4),
        mean=torch.ones(1, 3, 1, 1),
    )
    with pytest.warns(UserWarning, match="torch.fx cannot trace"):
        found = log_norm_product(model)
    assert found.item() == pytest.approx(frobenius(inner[0].weight, inner[2].weight), rel=1e-6)
    adapted = Branching(nn.Sequential(nn.ReLU(), Adapted(nn.Linear(4, 4))))
    with pytest.raises(
        ValueError, match=r"the sum of inner.1.base_layer and inner.1.lora_A.default"
    ):
        log_norm_product(adapted)


@pytest.mark.parametrize(
    ("shape", "is_adapter"), [((1, 1, 4), False), ((4,), False), ((2, 4), True)]
)
def test_only_a_matrix_may_be_an_adapter(shape, is_adapter):
    model = Wrapper(mlp())
    model.token = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match="with token, for which no norm is defined") as raised:
        log_norm_product(model)
    assert ("adapter" in str(raised.value)) == is_adapter


def test_metrics_of_a_model_without_graph_are_no_weights():
    pytest.importorskip("torchmetrics")
    from marginops.metrics import ClassManifolds

    model = Branching(nn.Linear(4, 4))
    model.manifolds = ClassManifolds(3, 4)
    with pytest.warns(UserWarning, match="torch.fx cannot trace"):
        found = log_norm_product(model)
    assert found.item() == pytest.approx(frobenius(model.inner.weight), rel=1e-6)


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / weight.norm(), bias)


def patched() -> nn.Module:
    model = mlp()
    log_norm_product(model)
    model[0].forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(Standardized(2, 2, 1)), r"got 0 \(.*Standardized\) with weight, bias"),
        (patched(), r"got 0 \(torch.nn.Linear\) with weight, bias, .* has a forward of its own"),
        (nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2))), "got bias, weight_orig"),
        (nn.Sequential(nn.ParameterDict({"a": nn.Parameter(torch.ones(2))}), mlp()), "is an adapt"),
        (torch.jit.trace(mlp(), torch.ones(1, 4)), "the model itself .* a compiled program"),
        (
            nn.Sequential(torch.jit.freeze(torch.jit.trace(mlp().eval(), torch.ones(1, 4))), mlp()),
            r"got 0 \(.*\), a compiled program",
        ),
        (torch.export.export(mlp(), (torch.ones(1, 4),)).module(), r"got 0 .* with weight, bias"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, device="meta")), r"1 .* meta device"),
        (Held(lambda m, x: m.layer(x), other=(n for n in ())), "copy.deepcopy can copy, got Held"),
    ],
)
def test_other_models_that_are_refused(model, message):
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        log_norm_product(model)


def test_a_lazy_layer_before_the_model_runs():
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.LazyConv1d(2, 1))
    with pytest.raises(ValueError, match=r"^model: .*1 \(torch.nn.LazyConv1d\) to be initialized"):
        log_norm_product(model, conv="operator", example_input=torch.ones(1, 1, 4))


def test_rounding_is_named():
    model = nn.Sequential(nn.Linear(2, 2), Function(lambda m, x: torch.round(x)))
    with pytest.warns(UserWarning, match=r"because of 1 \(function round\)"):
        log_norm_product(model)
