"""A metric takes the states of its own kind and no other, and stays as it was after a refusal."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from marginops.metrics import ClassManifolds, MarginDistribution, NeuralCollapse

FEATURES = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
TARGET = torch.arange(40) % 3
WEIGHT = FEATURES[:3] * 2
MARGINS = torch.cat((FEATURES[:20, 0], torch.tensor([math.inf])))


def filled(metric):
    if isinstance(metric, MarginDistribution):
        metric.update(MARGINS)
        metric.update(MARGINS - 1)
        return metric
    columns = FEATURES.repeat(1, 3)[:, : metric.num_features]
    if isinstance(metric, ClassManifolds):
        metric.update(columns, TARGET)
        return metric
    metric.update(columns, TARGET, WEIGHT.repeat(3, 3)[: metric.num_classes, : columns.shape[1]])
    metric.update_nearest(columns, FEATURES.repeat(1, 3)[:, : metric.num_classes], TARGET)
    return metric


METRICS = {
    "margins": lambda: MarginDistribution(),
    "exact margins": lambda: MarginDistribution(exact=True),
    "manifolds": lambda: ClassManifolds(3, 4),
    "collapse": lambda: NeuralCollapse(3, 4),
    "two passes": lambda: NeuralCollapse(3, 4, two_passes=True),
}
# Another metric, and what the error says about it.
OTHERS = {
    "margins": [(lambda: MarginDistribution(exact=True), "exact=False, got exact=True")],
    "exact margins": [(lambda: MarginDistribution(), "exact=True, got exact=False")],
    "manifolds": [
        (lambda: ClassManifolds(4, 4), "num_classes=3, got num_classes=4"),
        (lambda: ClassManifolds(3, 5), "num_features=4, got num_features=5"),
        (lambda: ClassManifolds(3, 4, normalize=False), "normalize=True, got normalize=False"),
        (lambda: ClassManifolds(3, 4, ignore_index=7), "ignore_index=-100, got ignore_index=7"),
        (lambda: NeuralCollapse(3, 4), "metric='ClassManifolds'.*got metric='NeuralCollapse'"),
    ],
    "collapse": [
        (lambda: NeuralCollapse(5, 6), "num_classes=3, num_features=4, got num_classes=5, num_f"),
        (lambda: NeuralCollapse(3, 4, ignore_index=7), "ignore_index=-100, got ignore_index=7"),
        (lambda: NeuralCollapse(3, 4, two_passes=True), "two_passes=False, got two_passes=True"),
        (lambda: ClassManifolds(3, 4), "metric='NeuralCollapse'.*got metric='ClassManifolds'"),
    ],
    "two passes": [(lambda: NeuralCollapse(3, 4), "two_passes=True, got two_passes=False")],
}
CASES = [(name, make, text) for name, cases in OTHERS.items() for make, text in cases]


def assert_state(metric, expected):
    for name, value in expected.items():
        actual = getattr(metric, name)
        assert type(actual) is type(value), name
        torch.testing.assert_close(actual, value, rtol=0, atol=0, equal_nan=True)


def load_into_metric(metric, state, **options):
    metric.load_state_dict(state, **options)


def load_into_model(metric, state, **options):
    collection = MetricCollection({"val": metric}, prefix="p_")
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "metrics": collection})
    states = {f"metrics.val.{name}": value for name, value in state.items()}
    model.load_state_dict({**model["layer"].state_dict(prefix="layer."), **states}, **options)


def merge(metric, state):
    metric.merge_state(state)


def refuses(metric, state, text, load=load_into_metric, error=RuntimeError, **options):
    """Check the error, and that neither the state nor later results change."""
    before = copy.deepcopy(metric.metric_state)
    with pytest.raises(error, match=text):
        load(metric, state, **options)
    assert_state(metric, before)


@pytest.mark.parametrize("load", [load_into_metric, load_into_model])
@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
@pytest.mark.parametrize(("name", "other", "text"), CASES)
def test_states_of_other_metrics(name, other, text, options, load):
    state = filled(other()).state_dict()
    refuses(filled(METRICS[name]()), state, f"state_dict: expected {text}", load, **options)


@pytest.mark.parametrize(("name", "other", "text"), CASES)
def test_merging_states_of_other_metrics(name, other, text):
    metric, wrong = filled(METRICS[name]()), filled(other())
    message = f"incoming_state: expected (a )?{text}"
    if type(wrong) is not type(metric):
        message = f"incoming_state: expected (a )?metric.*{type(wrong).__name__}"
    refuses(metric, wrong, message, merge, (TypeError, ValueError))
    refuses(metric, dict(wrong.state_dict()), f"incoming_state: expected {text}", merge, ValueError)


def forms(name, value):
    """Whatever has the wrong type, dtype, shape or place."""
    yield "None", None
    yield "str", "x"
    yield "dict", {}
    yield "numpy", np.zeros(3)
    yield "meta", torch.empty(3, device="meta")
    if isinstance(value, list):
        yield "tensor", torch.cat(value)
        yield "numbers", [1.0]
        yield "float32", [item.float() for item in value]
        yield "2-D", [item.unsqueeze(0) for item in value]
        yield "expanded", [torch.zeros((), dtype=torch.float64).expand(2**33)]
        return
    yield "list", [value]
    yield "stacked", torch.stack((value, value))
    yield "meta of its shape", value.to("meta")
    yield "complex", value.to(torch.complex64)
    yield "half", value.half()
    yield "int32", value.int()
    yield "longer", value.reshape(-1)[:1].expand(2**33)


@pytest.mark.parametrize("name", METRICS)
def test_states_of_a_wrong_form(name):
    state = filled(METRICS[name]()).state_dict()
    assert set(state) == {*METRICS[name]().own_states, "configuration"} & set(state)
    for key, value in state.items():
        metric = filled(METRICS[name]())
        rest = {other: kept for other, kept in state.items() if other != key}
        for strict in (True, False):
            refuses(metric, rest, f"state_dict: expected .*{key}", strict=strict)
        for form, wrong in forms(key, value):
            text = f"state_dict: expected .*{key}"
            try:
                refuses(metric, {**state, key: wrong}, text)
                refuses(metric, {**state, key: wrong}, "expected", merge, ValueError)
            except (AssertionError, pytest.fail.Exception) as error:
                raise AssertionError(f"{key}: {form}") from error


def damaged(state):
    """Values that no samples lead to."""
    for name in ("count", "bin_counts", "compared"):
        if name in state:
            yield name, -state[name] - 1
    if "bin_counts" in state:
        for row, step in ((0, -100), (1, -100), (1, 2**33)):
            counts = state["counts"].clone()
            counts[row] += step
            yield "counts", counts
        for value in (math.nan, math.inf, -math.inf, 1e6):
            yield "sums", torch.tensor([value, value], dtype=torch.float64)
            yield "minimum", torch.tensor(value, dtype=torch.float64)
        yield "sums", state["sums"].flip(0) + torch.tensor([100.0, 0.0])
        yield "maximum", -state["maximum"]
        yield "bin_counts", state["bin_counts"].flip(0)
        yield "bin_counts", state["bin_counts"] + 2**33
    if "margins" in state:
        for margins in ([], state["margins"][:1], [*state["margins"], torch.ones(2).double()]):
            yield "margins", margins
        yield "margins", [values + 1 for values in state["margins"]]
        yield "margins", [values * math.nan for values in state["margins"]]
        yield "bin_counts", state["bin_counts"].roll(1)
        yield "counts", state["counts"] - torch.tensor([1, 0])
    if "radius" in state:
        yield "radius", -state["radius"]
        yield "radius", state["radius"] * math.nan
        yield "radius", state["radius"] + 1
        yield "mean", state["mean"] * math.nan
        yield "mean", state["mean"] * 10
        yield "count", state["count"] * 0
    if "within_scatter" in state:
        for name in ("mean", "within_scatter"):
            yield name, state[name] * math.nan
            yield name, torch.full_like(state[name], math.inf)
        yield "within_scatter", -state["within_scatter"]
        yield "within_scatter", state["within_scatter"] + 1e3 * torch.eye(4).flip(0)
        yield "count", state["count"] * 0
    if "ratio" in state:
        for value in (-1.0, -math.inf):
            yield "ratio", torch.tensor(value, dtype=torch.float64)
        yield "compared", state["compared"] * 0
        yield "mean", torch.full_like(state["mean"], math.inf)
    if "centers" in state:
        yield "has_weight", torch.tensor(False)
        for value in (-1.0, 0.5, 41.0, math.inf):
            yield "differing", torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("name", METRICS)
def test_states_with_impossible_values(name):
    state = filled(METRICS[name]()).state_dict()
    for key, wrong in damaged(state):
        try:
            refuses(filled(METRICS[name]()), {**state, key: wrong}, "state_dict: expected")
            refuses(
                filled(METRICS[name]()), {**state, key: wrong}, "incoming_state", merge, ValueError
            )
        except (AssertionError, pytest.fail.Exception) as error:
            raise AssertionError(f"{key}: {wrong}") from error


@pytest.mark.parametrize("name", METRICS)
def test_unexpected_and_missing_keys(name):
    metric, state = filled(METRICS[name]()), filled(METRICS[name]()).state_dict()
    metric.update(*([MARGINS] if "margins" in name else [FEATURES, TARGET]))
    more = {**state, "more": torch.zeros(1)}
    refuses(metric, more, 'Unexpected key.*"more"')
    refuses(metric, {}, "Missing key.*configuration")
    before = copy.deepcopy(metric.metric_state)
    assert metric.load_state_dict({}, strict=False).missing_keys
    assert_state(metric, before)
    refuses(metric, more, "state_dict: expected only .*got also more", strict=False)


@pytest.mark.parametrize("damage", [b"", b"[" * 4000, b"{}", b"[1]", b'"x"', b"\xff", b"1"])
def test_damaged_configuration(damage):
    state = filled(ClassManifolds(3, 4)).state_dict()
    state["configuration"] = torch.tensor(list(damage), dtype=torch.uint8)
    refuses(filled(ClassManifolds(3, 4)), state, "state_dict: expected .*num_classes=3")


@pytest.mark.parametrize("name", METRICS)
def test_loading_drops_the_cached_result(name):
    metric, other = filled(METRICS[name]()), METRICS[name]()
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    if "margins" in name:
        other.update(MARGINS[:3])
    else:
        other.update(FEATURES[:6] + 1, TARGET[:6])
    other.compute()
    other.load_state_dict(torch.load(file, weights_only=True))
    for loaded, expected in zip(other.compute(), metric.compute(), strict=True):
        torch.testing.assert_close(loaded, expected, equal_nan=True)


def honest_batches():
    """Batches with NaN, infinities, zeros of both signs, of all scales, and empty ones."""
    for scale in (0.0, -0.0, 1e-30, 1.0, 1e18):
        for special in (None, math.nan, math.inf, -math.inf):
            values = torch.randn(9, 3) * scale
            if special is not None:
                values[4, 1] = special
            yield values
            yield values.bfloat16()
            yield values.double() * scale
    yield torch.empty(0, 3)


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_every_honest_state_loads(pairs):
    batches = list(honest_batches())
    target = torch.tensor([0, 0, 1, 1, 1, -100, 3, 3, 0])
    for first in range(0, len(batches), pairs):
        metrics = [
            *(lambda: MarginDistribution(), lambda: MarginDistribution(exact=True)),
            *(lambda: ClassManifolds(4, 3), lambda: ClassManifolds(4, 3, normalize=False)),
            *(lambda: NeuralCollapse(4, 3), lambda: NeuralCollapse(4, 3, two_passes=True)),
        ]
        for make in metrics:
            metric = make()
            for batch in batches[first : first + pairs]:
                if isinstance(metric, MarginDistribution):
                    metric.update(batch.flatten())
                else:
                    metric.update(batch, target[: len(batch)])
            other = make()
            other.load_state_dict(metric.state_dict())
            assert_state(other, metric.state_dict())
