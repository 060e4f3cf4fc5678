"""Ops, metrics and homogeneity refuse a replicated DTensor in every argument."""

import pytest
import torch

import marginops
from helpers.sharded import distributed_tensor, one_process
from marginops import homogeneity
from marginops.metrics import ClassManifolds, MarginDistribution, NeuralCollapse
from marginops.training import InversionMonitor

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch has no torch.distributed"
)

LOGITS, TARGET, LOG_NORM = torch.randn(6, 4), torch.arange(6) % 4, torch.tensor(0.5)
INPUT, WEIGHT, BIAS = torch.randn(6, 3), torch.randn(4, 3), torch.randn(4)
MARGINS = torch.randn(6)
LINEAR = {"input": INPUT, "weight": WEIGHT, "bias": BIAS}
CALLS = [
    (marginops.classification_margin, {"logits": LOGITS, "target": TARGET, "log_norm": LOG_NORM}),
    (marginops.minimal_margin_score, {"logits": LOGITS, "weight": WEIGHT, "bias": BIAS}),
    (
        marginops.sample_statistics,
        {"logits": LOGITS, "target": TARGET, "input": INPUT, "log_norm": LOG_NORM},
    ),
    (marginops.select_smallest, {"scores": MARGINS}),
    (marginops.select_classification_margin, {"logits": LOGITS, "target": TARGET}),
    (marginops.select_minimal_margin, {"logits": LOGITS, "weight": WEIGHT, "bias": BIAS}),
    (
        marginops.linear_classification_margin,
        {**LINEAR, "target": TARGET, "log_norm": LOG_NORM},
    ),
    (marginops.linear_minimal_margin_score, LINEAR),
    (marginops.linear_log_prob, {**LINEAR, "target": TARGET}),
    (marginops.linear_sample_statistics, {**LINEAR, "target": TARGET, "log_norm": LOG_NORM}),
    (marginops.linear_select_classification_margin, {**LINEAR, "target": TARGET}),
    (marginops.linear_select_minimal_margin, LINEAR),
    (marginops.class_moments, {"input": INPUT, "target": TARGET}),
    (
        marginops.multi_margin_regularization,
        {"input": INPUT, "weight": WEIGHT, "target": TARGET, "logits": LOGITS},
    ),
    (marginops.multi_margin_regularization, {**LINEAR, "target": TARGET}),
    (marginops.margin_area, {"margins": MARGINS}),
    (marginops.support_vector_counts, {"margins": MARGINS}),
    (marginops.log_spectral_complexity, {"input": INPUT}),
    (marginops.log_norm_product, {"example_input": INPUT}),
    (homogeneity.rates, {"example_input": INPUT}),
    (MarginDistribution().update, {"margins": MARGINS}),
    (NeuralCollapse(4, 3).update, {"input": INPUT, "target": TARGET, "weight": WEIGHT}),
    (NeuralCollapse(4, 3).update_nearest, {"input": INPUT, "logits": LOGITS, "target": TARGET}),
    (ClassManifolds(4, 3).update, {"input": INPUT, "target": TARGET}),
    (
        InversionMonitor(4, per_class=False).update,
        {"radius": torch.rand(4), "misclassified": MARGINS > 0},
    ),
]
LAYER = torch.nn.Linear(3, 4)
FIXED = {
    "select_smallest": {"k": 2},
    "select_classification_margin": {"k": 2},
    "select_minimal_margin": {"k": 2},
    "linear_select_classification_margin": {"k": 2},
    "linear_select_minimal_margin": {"k": 2},
    "class_moments": {"num_classes": 4},
    "log_spectral_complexity": {"model": LAYER},
    "log_norm_product": {"model": LAYER, "conv": "operator"},
    "rates": {"model": LAYER},
}


@pytest.fixture(scope="module")
def mesh():
    with one_process() as found:
        yield found


@pytest.mark.parametrize(("function", "arguments"), CALLS)
def test_every_argument(mesh, function, arguments):
    fixed = FIXED.get(function.__name__, {})
    function(**arguments, **fixed)
    for name, value in arguments.items():
        changed = arguments | {name: distributed_tensor(value, mesh)}
        # The linear functions take a DTensor that is split by classes as their weight.
        message = (
            rf"^{name}: expected an ordinary tensor( or a DTensor with .*)?, got a DTensor.*; "
            rf"pass {name}.full_tensor\(\)"
        )
        with pytest.raises(TypeError, match=message):
            function(**changed, **fixed)


def test_moments_of_others(mesh):
    moments = marginops.class_moments(INPUT, TARGET, 4)
    for name, value in moments._asdict().items():
        other = moments._replace(**{name: distributed_tensor(value, mesh)})
        with pytest.raises(TypeError, match=r"^other: .* got a DTensor"):
            moments.merge(other)


def test_parameters(mesh):
    layer = torch.nn.Linear(3, 4)
    layer.weight = torch.nn.Parameter(distributed_tensor(WEIGHT, mesh))
    given = {"weight": 1.0, "bias": 1.0}
    for function in (homogeneity.log_scale, homogeneity.lambda_seminorm):
        with pytest.raises(TypeError, match=r"^parameters: .* 'weight', got a DTensor; gather"):
            function(layer, given)
    with pytest.raises(TypeError, match=r"'weight', got a DTensor; gather .* full_tensor\(\)"):
        homogeneity.rescale(layer, given, 1.0)
    with pytest.raises(TypeError, match=r"^model: .* 'weight', got a DTensor; gather"):
        homogeneity.rates(layer, INPUT)
