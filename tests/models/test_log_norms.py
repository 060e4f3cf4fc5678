"""Every function with ``log_norm=`` takes the logarithm of each norm of a whole model."""

import pytest
import torch
from torch import nn

import marginops
from marginops import homogeneity

NORMS = {
    "norm product": marginops.log_norm_product,
    "spectral complexity": marginops.log_spectral_complexity,
    "scale": lambda model: homogeneity.log_scale(model, RATES),
    "largest rate": lambda model: homogeneity.log_scale(model, RATES, version="lambda_max"),
}
RATES = {"0.weight": 0.5, "0.bias": 0.5, "2.weight": 0.5, "2.bias": 1.0}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_every_function_divides_by_it(device, norm):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(device)
    features = torch.randn(8, 5, device=device)
    target = torch.arange(8, device=device) % 3
    weight, bias = model[2].weight, model[2].bias
    logits = model[2](features)
    log_norm = norm(model)
    assert log_norm.shape == ()
    expected = marginops.classification_margin(logits, target) * (-log_norm).exp().float()
    head = features, weight, target, bias
    for margins in (
        marginops.classification_margin(logits, target, log_norm=log_norm),
        marginops.sample_statistics(logits, target, log_norm=log_norm).margin,
        marginops.linear_classification_margin(*head, log_norm=log_norm),
        marginops.linear_sample_statistics(*head, log_norm=log_norm).margin,
    ):
        torch.testing.assert_close(margins, expected)
        gradients = [
            torch.autograd.grad(values.sum(), (weight, bias), retain_graph=True)
            for values in (margins, expected)
        ]
        torch.testing.assert_close(*gradients)
    for selection in (
        marginops.select_classification_margin(logits, target, 3, log_norm=log_norm),
        marginops.linear_select_classification_margin(*head, k=3, log_norm=log_norm),
    ):
        torch.testing.assert_close(selection.scores, expected.sort().values[:3])
