"""TrainingDynamics in a training loop: its read-outs, its loss and every wrong argument."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import marginops
from helpers.dynamics_twin import Twin
from helpers.rounding import assert_same
from marginops.training import TrainingDynamics
from marginops.training.dynamics.training_dynamics import _moved

SAMPLES, FEATURES, CLASSES = 40, 6, 5
FLOATS = [
    *("margin", "score", "loss", "margin_average", "aum"),
    *("confidence", "variability", "el2n", "correctness"),
]


def train(dynamics, twin, updates=30, device="cpu", dtype=torch.float32):
    """Train a small network with the dynamics in its loop, and step the twin beside it."""
    inputs, target = torch.randn(SAMPLES, FEATURES), torch.randint(CLASSES, (SAMPLES,))
    network = nn.Linear(FEATURES, CLASSES).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(updates):
        indices = torch.randint(SAMPLES - 4, (9,))  # with repetitions; four samples are never seen
        labels = target[indices].masked_fill(torch.rand(9) < 0.2, -100).to(device)
        logits = network(inputs[indices].to(device)).to(dtype)
        statistics = dynamics.update(indices, logits, labels)
        optimizer.zero_grad()
        statistics.mean_loss().backward()
        optimizer.step()
        plain = marginops.sample_statistics(logits.detach(), labels)
        fields = plain.margin, plain.top2_margin, plain.loss, plain.confidence, plain.el2n
        fields = *fields, plain.correct, plain.counted
        twin.update(indices.tolist(), *(field.tolist() for field in fields))


def readouts(twin):
    """What each attribute must be, from the twin's dictionaries."""
    rows = {name: [] for name in (*FLOATS, "count", "forgetting", "last_step", "learnt")}
    for s in twin.samples:
        seen, n = s is not None, s["n"] if s else 0
        names = {"margin_average": "average", "aum": "aum", "confidence": "mean", "el2n": "el2n"}
        for name in ("margin", "score", "loss"):
            rows[name].append(s[name] if seen else math.nan)
        for name, key in names.items():
            rows[name].append(s[key] if n else math.nan)
        rows["variability"].append(math.sqrt(s["m2"] / n) if n else math.nan)
        rows["correctness"].append(s["correct"] / n if n else math.nan)
        rows["count"].append(n)
        rows["forgetting"].append(s["forgotten"] if seen else 0)
        rows["learnt"].append(bool(seen and s["learnt"]))
        rows["last_step"].append(s["seen"] >> 32 if seen else -1)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_readouts_are_those_of_the_twin(device, dtype):
    dynamics, twin = TrainingDynamics(SAMPLES, decay=0.8, device=device), Twin(SAMPLES, 0.8)
    train(dynamics, twin, device=device, dtype=dtype)
    expected = readouts(twin)
    for name, values in expected.items():
        actual = getattr(dynamics, name)
        kind = {"count": "int32", "forgetting": "int32", "last_step": "int64", "learnt": "bool"}
        assert actual.dtype == getattr(torch, kind.get(name, "float32")), name
        assert actual.shape == (SAMPLES,) and actual.device == dynamics.device
        wanted = torch.tensor(np.array(values), dtype=actual.dtype)
        torch.testing.assert_close(actual.cpu(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
        actual.zero_()  # a copy, not the state
        torch.testing.assert_close(
            getattr(dynamics, name).cpu(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True
        )
    assert dynamics.num_updates == 30 and dynamics.num_nonfinite == 0
    assert dynamics.count.sum() > 150 and dynamics.forgetting.sum() > 0
    assert all(getattr(dynamics, name)[-4:].isnan().all() for name in FLOATS)


def test_the_loss_is_that_of_cross_entropy_with_its_gradient():
    dynamics = TrainingDynamics(8)
    logits, target = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, -100, 1])
    loss = dynamics.update(torch.arange(6), logits, target).mean_loss()
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)
    assert not any(value.requires_grad for value in dynamics._state)


def test_options_of_the_statistics_reach_them():
    logits, target, features = torch.randn(3, 4), torch.tensor([0, 7, 1]), torch.randn(3, 2)
    dynamics, own = TrainingDynamics(3), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    options = {"input": features, "log_norm": 0.7, "ignore_index": 7}
    statistics = dynamics.update(torch.arange(3), logits, target, score=own, **options)
    expected = marginops.sample_statistics(logits, target, **options)
    assert_same(statistics.gradient_norm, expected.gradient_norm)
    assert_same(dynamics.margin[[0, 2]], expected.margin[[0, 2]])
    assert_same(dynamics.score, torch.tensor([3.0, math.nan, 1.0]))
    assert dynamics.count.tolist() == [1, 0, 1]


def test_a_head_without_logits_gives_the_same():
    features, head, target = torch.randn(9, 6), nn.Linear(6, 4), torch.randint(4, (9,))
    one, other = TrainingDynamics(9), TrainingDynamics(9)
    one.update(torch.arange(9), head(features), target)
    statistics = marginops.linear_sample_statistics(features, head.weight, target, head.bias)
    other.record(torch.arange(9), statistics)
    assert statistics.loss.requires_grad
    for name in FLOATS:
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_values_that_are_not_finite_are_counted_and_leave_the_means_alone():
    dynamics, index = TrainingDynamics(2), torch.tensor([0])
    rows = [[1.0, 0.0], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, 0.0]]
    for row in rows:
        dynamics.update(index, torch.tensor([row]), torch.tensor([0]))
    assert dynamics.num_nonfinite == 3 and dynamics.num_updates == 4
    assert dynamics.count.tolist() == [1, 0] and dynamics.last_step.tolist() == [3, -1]
    assert dynamics.margin[0] == -math.inf and dynamics.loss[0] == math.inf
    assert dynamics.aum[0] == dynamics.margin_average[0] == 1
    assert dynamics.variability[0] == 0


def test_statistics_of_another_device_arrive_as_they_are(device):
    fields = (*torch.randn(5, 7, dtype=torch.float64), *(torch.rand(2, 7) < 0.5))
    fields[0][2] = math.nan
    moved = _moved(tuple(field.to(device) for field in fields), torch.device("cpu"))
    for one, other in zip(moved, fields, strict=True):
        assert_same(one, other)
    one, other = TrainingDynamics(SAMPLES), TrainingDynamics(SAMPLES, device=device)
    for dynamics in (one, other):
        torch.manual_seed(3)
        train(dynamics, Twin(SAMPLES, 0.5), device=device)
    for name in FLOATS:
        assert_same(getattr(one, name), getattr(other, name).cpu())


def test_an_update_can_be_compiled(device):
    dynamics, plain = (TrainingDynamics(7, device=device) for _ in range(2))
    logits, target = torch.randn(5, 3, device=device), torch.tensor([0, 1, 2, 0, 1], device=device)
    indices = torch.tensor([6, 1, 1, 0, 4], device=device)

    def step(dynamics, logits):
        return dynamics.update(indices, logits, target).mean_loss()

    compiled = torch.compile(lambda logits: step(dynamics, logits), backend="aot_eager")
    torch.testing.assert_close(compiled(logits), step(plain, logits))
    for one, other in zip(dynamics._state, plain._state, strict=True):
        assert_same(one, other)


RIGHT = {
    "indices": torch.arange(4),
    "logits": torch.randn(4, 3),
    "target": torch.tensor([0, 1, 2, 0]),
    "score": torch.randn(4),
}
MISTAKES = {
    "a list": (
        "indices",
        [0, 1, 2, 3],
        TypeError,
        r"a tensor \[B\], got list; pass torch.as_tensor",
    ),
    "int32": (
        "indices",
        RIGHT["indices"].int(),
        TypeError,
        r".* got torch.int32; pass indices.long\(\)",
    ),
    "bool": ("indices", RIGHT["indices"] > 1, TypeError, r".* got torch.bool$"),
    "float": (
        "indices",
        RIGHT["indices"].bfloat16(),
        TypeError,
        r".* got torch.bfloat16; take .* digits",
    ),
    "short": ("indices", RIGHT["indices"][:3], ValueError, r"shape \[4\], .* got \[3\]"),
    "column": ("indices", RIGHT["indices"][:, None], ValueError, r"shape \[B\], got \[4, 1\]"),
    "negative": ("indices", RIGHT["indices"] - 1, RuntimeError, r"values in \[0, 4\), got -1"),
    "large": ("indices", RIGHT["indices"] + 3, RuntimeError, r"values in \[0, 4\), got [456]"),
    "logits": ("logits", RIGHT["logits"][0], ValueError, r"shape \[N, C\]"),
    "target": ("target", RIGHT["target"] + 3, RuntimeError, r"classes in \[0, 3\)"),
    "score": ("score", RIGHT["score"][:3], ValueError, r"shape \[4\], .* got \[3\]"),
    "integers": ("score", RIGHT["target"], TypeError, r"dtype float32"),
    "meta": ("score", RIGHT["score"].to("meta"), ValueError, r"device cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_arguments_are_named_and_change_nothing(mistake):
    name, value, kind, message = MISTAKES[mistake]
    dynamics = TrainingDynamics(4)
    dynamics.update(**RIGHT)
    before = [tensor.clone() for tensor in dynamics._state]
    with pytest.raises(kind, match=f"{name}: expected {message}"):
        dynamics.update(**{**RIGHT, name: value})
    for one, other in zip(dynamics._state, before, strict=True):
        assert_same(one, other)


def test_wrong_statistics_are_named():
    logits = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"statistics: expected marginops.SampleStatistics, got T"):
        TrainingDynamics(4).record(torch.arange(2), logits)
    statistics = marginops.sample_statistics(logits, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"indices: expected shape \[2\]"):
        TrainingDynamics(4).record(torch.arange(3), statistics)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples: expected at least 1, got 0"),
        ({"num_samples": 1.5}, TypeError, "num_samples: expected an int, got float"),
        ({"num_samples": True}, TypeError, "num_samples: expected an int, got bool"),
        ({"decay": 1.0}, ValueError, "decay: expected a value in [0, 1), got 1.0"),
        ({"decay": -0.1}, ValueError, "decay: expected a value in [0, 1), got -0.1"),
        ({"decay": math.nan}, ValueError, "decay: expected a value in [0, 1), got nan"),
        ({"decay": "a"}, TypeError, "decay: expected a float, got str"),
    ],
)
def test_wrong_arguments_of_the_constructor(arguments, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        TrainingDynamics(**{"num_samples": 3, **arguments})


def test_repr_says_what_it_is():
    text = "TrainingDynamics(num_samples=3, decay=0.5, device=cpu)"
    assert repr(TrainingDynamics(3)) == text


def test_tokens_have_no_index() -> None:
    dynamics = TrainingDynamics(12)
    logits, target = torch.randn(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64)
    for labels, indices in ((target, torch.arange(12)), (target[:, 0], torch.arange(3))):
        with pytest.raises(ValueError, match=r"^logits: .* got \[3, 4, 5\]; pass .*flatten\(0, -2"):
            dynamics.update(indices, logits, labels)
    statistics = marginops.sample_statistics(logits, target)
    with pytest.raises(ValueError, match=r"^statistics: expected fields of shape \[B\].* \[3, 4\]"):
        dynamics.record(torch.arange(12), statistics)
    assert not dynamics.count.any()
    dynamics.update(torch.arange(12), logits.flatten(0, -2), target.flatten())
    assert dynamics.count.tolist() == [1] * 12
