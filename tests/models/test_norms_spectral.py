"""Spectral norms, convolutions as operators, and the spectral complexity."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

import marginops
from helpers.models_for_norms import Function, dense, with_statistics
from marginops.norms import log_norm_product, log_spectral_complexity
from marginops.norms.spectral import leading_eigenvector, random_start

CONVOLUTIONS = {
    "zeros": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
    "strided": (nn.Conv2d(2, 3, (3, 2), stride=(2, 3), padding=(1, 0)), (2, 7, 6)),
    "dilated": (nn.Conv2d(2, 2, 3, dilation=2, padding=2), (2, 5, 5)),
    "same": (nn.Conv2d(2, 2, (4, 3), padding="same", dilation=(1, 2)), (2, 6, 5)),
    "valid": (nn.Conv1d(2, 3, 3, padding="valid"), (2, 8)),
    "grouped": (nn.Conv1d(4, 6, 3, groups=2, padding=1), (4, 5)),
    "three axes": (nn.Conv3d(1, 2, 2, padding=1), (1, 3, 2, 3)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), (3, 3, 4)),
    "transposed, grouped": (
        nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2, groups=2, output_padding=1),
        (4, 5),
    ),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 4)),
    "circular, grouped": (
        nn.Conv2d(4, 4, 3, padding=1, groups=2, padding_mode="circular"),
        (4, 4, 3),
    ),
    "circular, strided": (
        nn.Conv2d(2, 3, (3, 4), stride=(1, 2), padding=(1, 1), padding_mode="circular"),
        (2, 5, 6),
    ),
    "circular, dilated": (
        nn.Conv1d(2, 3, 3, dilation=2, padding=2, padding_mode="circular"),
        (2, 6),
    ),
    "circular, of another size": (
        nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"),
        (2, 6),
    ),
    "circular, three axes": (
        nn.Conv3d(1, 2, 3, stride=(2, 1, 1), padding=1, padding_mode="circular"),
        (1, 4, 3, 4),
    ),
}
MIRRORED = {
    "reflect": (nn.Conv1d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6)),
    "replicate": (nn.Conv2d(1, 2, 3, padding=1, padding_mode="replicate"), (1, 4, 3)),
    "circular, wrapping": (nn.Conv1d(2, 3, 5, padding=2, padding_mode="circular"), (2, 3)),
}


def cases(layers):
    return pytest.mark.parametrize(("layer", "shape"), layers.values(), ids=layers.keys())


@cases(CONVOLUTIONS | MIRRORED)
def test_operator_equals_the_dense_matrix(device, layer, shape):
    layer = layer.double()
    expected = torch.linalg.matrix_norm(dense(layer, shape), 2).log().item()
    example = torch.ones(2, *shape, dtype=torch.float64, device=device)
    layer = copy.deepcopy(layer).to(device)
    for precise, tolerance in ((layer, 1e-7), (copy.deepcopy(layer).float(), 1e-5)):
        result = log_norm_product(
            precise, norm="spectral", conv="operator", example_input=example.to(precise.weight)
        )
        assert result.item() == pytest.approx(expected, abs=tolerance)


@cases(CONVOLUTIONS)
def test_operator_in_the_frobenius_and_row_norms(layer, shape):
    layer = layer.double()
    matrix, example = dense(layer, shape), torch.ones(1, *shape, dtype=torch.float64)
    how = {"conv": "operator", "example_input": example}
    result = log_norm_product(layer, **how)
    assert result.item() == pytest.approx(matrix.norm().log().item(), abs=1e-9)
    # The spectral norm cancels in the complexity of one layer.
    complexity = log_spectral_complexity(layer, **how).exp().item()
    assert complexity == pytest.approx(matrix.norm(dim=1).sum().item(), rel=1e-6)


@cases(MIRRORED)
def test_paddings_that_repeat_an_entry_are_refused(layer, shape):
    with pytest.raises(ValueError, match=r"conv: expected padding with zeros"):
        log_norm_product(
            layer, conv="operator", example_input=torch.ones(1, *shape).to(layer.weight)
        )


def test_every_call_of_a_convolution_has_its_own_size():
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    model = nn.Sequential(conv, nn.MaxPool2d(2), conv)
    example = torch.ones(3, 2, 6, 8, dtype=torch.float64)
    expected = sum(
        torch.linalg.matrix_norm(dense(conv, shape), 2).log().item()
        for shape in ((2, 6, 8), (2, 3, 4))
    )
    for given in (example, (example,), example[0]):
        result = log_norm_product(model, norm="spectral", conv="operator", example_input=given)
        assert result.item() == pytest.approx(expected, abs=1e-6)


def test_layers_called_by_keyword_and_inference_mode():
    layer, shape = CONVOLUTIONS["zeros"]
    example = torch.ones(1, *shape).to(layer.weight)
    how = {"norm": "spectral", "conv": "operator", "example_input": example}
    expected = log_norm_product(layer, **how).detach()
    model = Function(lambda m, x: m.layer(input=x))
    model.layer = layer
    assert log_norm_product(model, **how) == expected
    with torch.inference_mode():
        assert log_norm_product(layer, **how) == expected


@pytest.mark.parametrize("layer", ["zeros", "circular, strided", "transposed, grouped"])
def test_gradients_of_operators(layer):
    module, shape = CONVOLUTIONS[layer]
    module = copy.deepcopy(module).double()
    example = torch.ones(1, *shape, dtype=torch.float64)

    def product(weight):
        del module._parameters["weight"]
        module._parameters["weight"] = weight
        return log_norm_product(
            module, norm="spectral", conv="operator", example_input=example, tolerance=1e-10
        )

    weight = module.weight.detach().clone().requires_grad_()
    torch.autograd.gradcheck(product, weight, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("shape", [(1, 9), (40, 200), (200, 40), (300, 70), (1100, 1030)])
def test_matrices_of_every_size(device, shape):
    layer = nn.Linear(shape[1], shape[0]).to(device)
    expected = torch.linalg.svdvals(layer.weight.detach().double())[0].log().item()
    for tolerance in (1e-6, 1e-10):
        result = log_norm_product(layer, norm="spectral", tolerance=tolerance)
        assert result.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-7, 1e-4])
@pytest.mark.parametrize("size", [80, 1030])
def test_clustered_singular_values(size, gap):
    values = torch.linspace(0.1, 0.9, size, dtype=torch.float64)
    values[:20] = 1 - gap * torch.arange(20)
    layer = nn.Linear(size, size, bias=False).double()
    reflection = torch.randn(size, 1, dtype=torch.float64)
    reflection /= reflection.norm()
    layer.weight.data = torch.diag(values) - 2 * reflection @ (reflection.T * values)
    assert log_norm_product(layer, norm="spectral").item() == pytest.approx(0, abs=1e-6)


def test_the_residual_is_below_the_tolerance_after_restarts():
    size = 2000
    values = torch.linspace(0, 1, size, dtype=torch.float64)
    applications = []

    def apply(vector):
        applications.append(1)
        return values * vector

    vector = leading_eigenvector(apply, random_start(size, values), 1e-6, "it")
    value = (vector * values * vector).sum()
    assert len(applications) > 2 * 20  # twice the room for the basis of ARPACK
    assert (values * vector - value * vector).norm() <= 1.01e-6
    assert value.item() == pytest.approx(1, abs=1e-6)


def test_no_convergence_is_an_error(monkeypatch):
    monkeypatch.setattr("marginops.norms.spectral.RESTARTS", 1)
    model = nn.Sequential(nn.Linear(900, 800))
    with pytest.raises(
        RuntimeError,
        match=r"norm of 0 .* did not converge to a tolerance of 1e-06 in 1 restarts",
    ):
        log_norm_product(model, norm="spectral")


def bartlett(matrices, origins):
    """The spectral complexity by its definition."""
    norms = [torch.linalg.matrix_norm(matrix, 2) for matrix in matrices]
    pairs = zip(matrices, origins, norms, strict=True)
    total = sum(((a - m).norm(dim=1).sum() / s) ** (2 / 3) for a, m, s in pairs)
    return math.prod(norms) * total ** (3 / 2)


def test_margins_over_the_spectral_complexity(device):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    ).double()
    first, last = copy.deepcopy(with_statistics(model)), with_statistics(model)
    for parameter in last.parameters():
        parameter.data += torch.randn_like(parameter)
    data = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    logits, target = last.eval()(data).detach(), torch.tensor([0, 1, 2, 3, 0, -100])

    def matrices(model):
        scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
        return [model[0].weight.flatten(1) * scale[:, None], model[4].weight]

    zeros = [0 * matrix for matrix in matrices(last)]
    size = data.norm() / len(data)
    plain = marginops.classification_margin(logits, target)
    on_device = last.to(device)
    for reference, origins in ((None, zeros), (first.to(device), matrices(first.cpu()))):
        if reference is not None:
            reference = copy.deepcopy(reference).to(device)
        expected = plain / (bartlett(matrices(copy.deepcopy(last).cpu()), origins) * size).detach()
        log_norm = log_spectral_complexity(on_device, reference, data.to(device))
        result = marginops.classification_margin(logits, target, log_norm=log_norm.cpu())
        assert log_norm.device.type == torch.device(device).type and log_norm.shape == ()
        torch.testing.assert_close(result.detach(), expected.detach())
    assert result[-1] == math.inf
    affine = log_spectral_complexity(on_device, batch_norm="affine").detach().cpu()
    last = last.cpu()
    parts = [last[0].weight.flatten(1), last[1].weight.diag(), last[4].weight]
    expected = bartlett(parts, [0 * part for part in parts]).log()
    torch.testing.assert_close(affine, expected.detach())


def test_the_reference_itself_has_no_complexity():
    model = nn.Linear(3, 3)
    log_norm = log_spectral_complexity(model, copy.deepcopy(model))
    assert log_norm.item() == -math.inf
    margin = marginops.classification_margin(torch.eye(3), torch.arange(3), log_norm=log_norm)
    assert margin.tolist() == [math.inf] * 3


@pytest.mark.parametrize("conv", ["flattened", "operator"])
def test_a_layer_that_stayed_has_no_part_in_the_gradient(conv):
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 3)).double()
    origin = copy.deepcopy(model)
    nn.init.normal_(origin[0].weight)
    example = torch.ones(1, 1, 8, dtype=torch.float64)
    log_spectral_complexity(model, origin, conv=conv, example_input=example).backward()
    one = model[1].weight
    spectral = log_norm_product(model[1], norm="spectral")
    if conv == "flattened":
        # The others are s_1 and the distance of layer 0, of which the spectral norm cancels.
        torch.testing.assert_close(one.grad, torch.autograd.grad(spectral, one)[0])
    assert all(layer.weight.grad.isfinite().all() for layer in model)


def test_gradient_of_the_complexity():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    origin = copy.deepcopy(model)
    nn.init.normal_(origin[0].weight)
    nn.init.normal_(origin[2].weight)

    def complexity(weight, data):
        del model[0]._parameters["weight"]
        model[0]._parameters["weight"] = weight
        return log_spectral_complexity(model, origin, data)

    values = torch.randn(4, 3), torch.randn(2, 3)
    torch.autograd.gradcheck(complexity, [value.double().requires_grad_() for value in values])


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"reference": nn.Linear(2, 3)}, ValueError, r"reference: expected shape \[2, 2\] as"),
        ({"reference": nn.Sequential(*[nn.Linear(2, 2)] * 2)}, ValueError, "expected 1 layers"),
        ({"reference": 1}, TypeError, "reference: expected a torch.nn.Module, got int"),
        ({"reference": nn.Embedding(2, 2)}, ValueError, "reference: expected linear layers, conv"),
        ({"input": [1.0]}, TypeError, r"input: expected a tensor \[n, ...\], got list"),
        ({"input": torch.ones(0, 2)}, ValueError, "input: expected at least one sample"),
        ({"input": torch.ones(3).int()}, TypeError, "input: expected dtype"),
        ({"conv": "operator"}, ValueError, "example_input: expected an input of the model"),
    ],
)
def test_wrong_arguments(how, error, message):
    with pytest.raises(error, match=message):
        log_spectral_complexity(nn.Linear(2, 2), **how)


def test_missing_scipy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    log_norm_product(nn.Linear(100, 64), norm="spectral")
    with pytest.raises(ImportError, match=r"the model itself .*pip install \"marginops\[norms\]"):
        log_spectral_complexity(nn.Linear(65, 65))
