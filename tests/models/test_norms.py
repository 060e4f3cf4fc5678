"""log_norm_product: values and batch norms; the model stays unchanged."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize

from helpers.models_for_norms import Function, Residual, resnet18, with_statistics
from marginops.norms import log_norm_product

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def log_norms(model: nn.Module, **how) -> float:
    """The sum of the logarithms of the norms, by torch.linalg, with every layer once."""
    found = 0.0
    for layer in model.modules():
        if isinstance(layer, LAYERS):
            matrix = layer.weight.detach().double().flatten(1)
            found += torch.linalg.matrix_norm(matrix, **how).log().item()
    return found


def fused(model: nn.Module) -> nn.Module:
    """A copy in which torch's own utility has folded each batch norm into the layer before it."""
    model = copy.deepcopy(model).eval()
    for parent in model.modules():
        children = list(parent.named_children())
        for (name, layer), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(norm, BATCH_NORMS) and isinstance(layer, LAYERS):
                if isinstance(layer, nn.Linear):
                    new = fusion.fuse_linear_bn_eval(layer, norm)
                else:
                    new = fusion.fuse_conv_bn_eval(layer, norm, isinstance(layer, TRANSPOSED))
                setattr(parent, name, new)
                setattr(parent, norm_name, nn.Identity())
    return model


def mlp(*widths: int) -> nn.Sequential:
    parts = []
    for inputs, outputs in itertools.pairwise(widths):
        parts += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def mixed() -> nn.Module:
    return with_statistics(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.Dropout(), nn.BatchNorm2d(6)),
            nn.ReLU(),
            nn.Conv2d(6, 4, (3, 1), groups=2, bias=False),
            nn.BatchNorm2d(4, affine=False),
            nn.ConvTranspose2d(4, 7, 2),
            nn.BatchNorm2d(7),
            nn.Flatten(),
            nn.Linear(7 * 4 * 6, 9),
            nn.BatchNorm1d(9),
            nn.LeakyReLU(),
            nn.Linear(9, 5),
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("norm", "order"), [("frobenius", "fro"), ("spectral", 2)])
def test_layers_without_batch_norm(device, norm, order, dtype):
    model = nn.Sequential(
        nn.Conv1d(3, 70, 5), nn.ReLU(), nn.Conv1d(70, 90, 2), nn.Flatten(), nn.Linear(180, 130)
    ).to(device, dtype)
    result = log_norm_product(model, norm=norm)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.shape == ()
    assert result.item() == pytest.approx(log_norms(model, ord=order), abs=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("norm", "order"), [("frobenius", "fro"), ("spectral", 2)])
def test_folding_equals_the_fused_network(device, norm, order, memory_format):
    model = with_statistics(resnet18(8, 10)).to(device)
    expected = log_norms(fused(model), ord=order)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused(model).modules())
    model = model.to(memory_format=memory_format)
    assert log_norm_product(model, norm=norm).item() == pytest.approx(expected, rel=1e-5)


def test_folding_past_functional_dropout():
    model = Function(lambda m, x: m.norm(F.dropout(m.layer(x), 0.3, training=m.training)))
    model.norm = nn.BatchNorm1d(3)
    expected = log_norm_product(nn.Sequential(model.layer, with_statistics(model.norm)))
    assert log_norm_product(model) == expected
    always = Function(lambda m, x: m.norm(F.dropout(m.layer(x))))
    always.norm = model.norm
    with pytest.raises(ValueError, match=r"norm \(torch.nn.BatchNorm1d\) after no layer"):
        log_norm_product(always)


def test_folding_into_every_kind_of_layer(device):
    model = mixed()
    expected = fused(nn.Sequential(*[m for part in model for m in flat(part)]))
    result = log_norm_product(model.to(device)).item()
    assert result == pytest.approx(log_norms(expected, ord="fro"), rel=1e-5)


def flat(part):
    """The modules of a part without dropout, which separates a layer from its batch norm."""
    parts = part if isinstance(part, nn.Sequential) else [part]
    return [module for module in parts if not isinstance(module, nn.Dropout)]


def test_batch_norm_last_and_affine():
    model = mixed()
    last = model[-1].weight.norm().log().item()
    assert log_norm_product(model, batch_norm="last").item() == pytest.approx(last, rel=1e-5)
    gammas = [model[0][2].weight, torch.ones(4), model[5].weight, model[8].weight]
    affine = sum(gamma.norm().log().item() for gamma in gammas) + log_norms(model, ord="fro")
    assert log_norm_product(model, batch_norm="affine").item() == pytest.approx(affine, rel=1e-5)
    plain = mlp(3, 4, 5)
    products = [log_norm_product(plain, batch_norm=how) for how in ("fold", "last", "affine")]
    assert products[0] == products[1] == products[2]


def test_all_layers_after_the_last_normalization_count():
    model = with_statistics(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), mlp(4, 5, 3)))
    result = log_norm_product(model, batch_norm="last")
    assert result.item() == pytest.approx(log_norms(model[2], ord="fro"), rel=1e-5)


def test_wrappers_do_not_count():
    model = with_statistics(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    for wrapped in (nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert log_norm_product(wrapped) == log_norm_product(model)


def test_spectral_affine_takes_the_largest_gamma():
    model = with_statistics(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    expected = torch.linalg.matrix_norm(model[0].weight, 2) * model[1].weight.abs().max()
    result = log_norm_product(model, norm="spectral", batch_norm="affine")
    torch.testing.assert_close(result, expected.log())


def test_margins_over_the_product_do_not_change_when_layers_are_scaled():
    model = mlp(6, 40, 30, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    for norm in ("frobenius", "spectral"):
        before = model(x) * (-log_norm_product(model, norm=norm)).exp()
        scaled = copy.deepcopy(model)
        for layer, factor in zip(scaled[::2], (3.0, 1e-6, 7e4), strict=True):
            layer.weight.data *= factor
        after = scaled(x) * (-log_norm_product(scaled, norm=norm)).exp()
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e36])
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_nothing_over_or_underflows(norm, size):
    deep = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(1000)])
    for layer in deep:
        nn.init.eye_(layer.weight).data.mul_(size)
    one = math.log(size) + (math.log(3) / 2 if norm == "frobenius" else 0)
    result = log_norm_product(deep, norm=norm)
    assert result.item() == pytest.approx(1000 * one, rel=1e-6, abs=1e-3)
    gradient = torch.autograd.grad(result, deep[0].weight)[0]
    assert gradient.isfinite().all()
    assert (gradient * deep[0].weight).sum().item() == pytest.approx(1, rel=1e-5)


def test_rows_that_are_zero_or_far_apart():
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data = torch.tensor([[3e-25, 0, 0, 4e-25], [0, 0, 0, 0], [0, 0, 1.2e-24, 0]])
    result = log_norm_product(layer)
    assert result.item() == pytest.approx(math.log(1.3e-24), rel=1e-6)
    assert torch.autograd.grad(result, layer.weight)[0].isfinite().all()
    layer.double().weight.data *= 1e200
    layer.weight.data *= 1e120
    assert log_norm_product(layer).item() == pytest.approx(math.log(1.3) + 296 * math.log(10))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_zero_infinite_and_nan_weights(norm):
    for value, expected in ((0.0, -math.inf), (math.inf, math.inf), (math.nan, math.nan)):
        layer = nn.Linear(3, 3)
        nn.init.zeros_(layer.weight).data[1, 1] = value
        assert log_norm_product(layer, norm=norm).item() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("batch_norm", ["fold", "affine", "last"])
def test_gradients(norm, batch_norm):
    parts = nn.Conv2d(2, 4, 2, groups=2), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2, groups=2)
    model = nn.Sequential(*parts, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 2)).double()
    with_statistics(model)
    names = [name for name, p in model.named_parameters() if "bias" not in name]

    def product(*values):
        for name, value in zip(names, values, strict=True):
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            del module._parameters[last]
            module._parameters[last] = value
        return log_norm_product(model, norm=norm, batch_norm=batch_norm)

    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    torch.autograd.gradcheck(product, values)


def test_no_second_derivative_of_the_spectral_norm():
    layer = nn.Linear(3, 3)
    gradient = torch.autograd.grad(
        log_norm_product(layer, norm="spectral"), layer.weight, create_graph=True
    )[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Shared(nn.Module):
    """A layer that is called twice, each time followed by another batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x, skip=None):
        x = torch.relu(self.first(self.layer(x)))
        if skip is not None:
            x = x + skip
        return self.second(self.layer(x))


def test_layers_count_once_for_each_use():
    layer = nn.Linear(4, 4)
    one = log_norm_product(layer)
    torch.testing.assert_close(log_norm_product(nn.Sequential(layer, nn.ReLU(), layer)), 2 * one)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    torch.testing.assert_close(log_norm_product(nn.Sequential(layer, tied)), 2 * one)
    model = with_statistics(Shared())
    pairs = [fusion.fuse_linear_bn_eval(model.eval().layer, n) for n in (model.first, model.second)]
    expected = sum(pair.weight.norm().log().item() for pair in pairs)
    assert log_norm_product(model).item() == pytest.approx(expected, rel=1e-5)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.auxiliary = nn.Linear(3, 2), nn.Linear(3, 7)
        self.features = None

    def forward(self, x):
        self.features = x
        return (self.body(x), self.auxiliary(x)) if self.training else self.body(x)


def test_a_model_is_read_as_in_evaluation_and_left_as_it_was():
    model = Unused()
    seen = []
    model.body.register_forward_hook(lambda *_: seen.append(1))
    assert log_norm_product(model) == log_norm_product(model.body)
    assert model.training and model.features is None and not seen
    norm = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
    parametrizations.spectral_norm(norm[0])
    before = copy.deepcopy(norm.state_dict())
    example = torch.randn(2, 3, 5, 5)
    for norm_name in ("frobenius", "spectral"):
        log_norm_product(norm, norm=norm_name, conv="operator", example_input=example)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    assert all(module.training for module in norm.modules())


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_layers(wrap):
    model = nn.Sequential(wrap(nn.Linear(5, 5)), nn.ReLU(), nn.Linear(5, 2))
    assert parametrize.is_parametrized(model[0])
    expected = log_norms(nn.Sequential(*map(plain, model[::2])), ord="fro")
    result = log_norm_product(model)
    assert result.item() == pytest.approx(expected, rel=1e-5)
    result.backward()
    assert all(p.grad is not None for p in model[0].parametrizations.parameters())


def plain(layer):
    copied = nn.Linear(layer.in_features, layer.out_features)
    copied.weight.data = layer.weight.data
    return copied


def test_a_model_that_changes_is_traced_again():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    log_norm_product(model)
    model[1] = nn.ReLU()
    assert log_norm_product(model).item() == pytest.approx(log_norms(model, ord="fro"), rel=1e-5)
    model.append(nn.Linear(2, 9))
    assert log_norm_product(model).item() == pytest.approx(log_norms(model, ord="fro"), rel=1e-5)
    branching = Function(lambda m, x: m.last(x) if m.is_short else m.last(m.layer(x)))
    branching.last, branching.is_short = nn.Linear(3, 2), True
    assert log_norm_product(branching) == log_norm_product(branching.last)
    branching.is_short = False
    both = log_norm_product(branching.last) + log_norm_product(branching.layer)
    torch.testing.assert_close(log_norm_product(branching), both)


def test_residual_blocks_count_all_their_layers():
    block = with_statistics(Residual(3, 4, 2))
    layers = nn.Sequential(block.conv1, block.bn1, block.conv2, block.bn2, *block.shortcut)
    torch.testing.assert_close(log_norm_product(block), log_norm_product(layers))
