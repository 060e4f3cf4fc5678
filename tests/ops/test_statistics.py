"""sample_statistics: brute force, other libraries, precision, layouts."""

import math

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given
from torchmetrics.functional.classification import multiclass_accuracy

import marginops
from helpers import brute_force
from helpers.ops import IMPLEMENTATIONS, head, implementation
from helpers.rounding import assert_same, assert_within, random_logits, rounding
from helpers.strategies import relayout, statistics_cases
from marginops._checks import result_dtype
from marginops.ops import margin_pair

FLOATING = ("margin", "top2_margin", "loss", "confidence", "entropy", "el2n", "gradient_norm")


def assert_statistics(result, expected, logits, target):
    limits = torch.finfo(result_dtype(logits.dtype))
    relative = rounding(logits, target)
    for name, values in expected.items():
        actual = getattr(result, name)
        if name in ("rival", "correct"):
            assert actual.dtype == (torch.int64 if name == "rival" else torch.bool)
            assert actual.tolist() == values.tolist(), name
            continue
        assert actual.dtype == result_dtype(logits.dtype)
        # Exponentials may underflow; in EL2N their squares may.
        absolute = limits.tiny * 1e6
        if name in ("el2n", "gradient_norm"):
            scale = expected["gradient_norm"] / expected["el2n"] if name != "el2n" else 1
            absolute = 2 * math.sqrt(limits.tiny) * np.nan_to_num(np.maximum(scale, 1), nan=1)
        if name in ("margin", "top2_margin"):
            values = np.where(np.abs(values) > limits.max, np.copysign(np.inf, values), values)
        assert_within(actual, values, relative, absolute, name)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=statistics_cases())
@pytest.mark.filterwarnings("ignore:divide by zero|invalid value:RuntimeWarning")
def test_statistics_match_brute_force(device, which, case):
    logits, target, input, log_norm = case
    there = logits.to(device), target.to(device)
    with implementation(which):
        result = marginops.sample_statistics(
            *there, input=None if input is None else input.to(device), log_norm=log_norm
        )
        assert_same(result.margin, marginops.classification_margin(*there, log_norm=log_norm))
        _, rival = margin_pair.classification_margin_rival_op(*there, None, None, -100)
    assert_same(result.rival, rival)
    assert (result.gradient_norm is None) == (input is None)
    expected = brute_force.sample_statistics(logits, target, input, log_norm or 0.0)
    assert_statistics(result, expected, logits, target)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
@pytest.mark.parametrize("classes", [16, 47, 2048, 2049, 5000])
def test_long_rows_in_every_order(device, dtype, which, layout, classes):
    random = torch.randn(4, classes, dtype=torch.float64).mul(4).to(dtype)
    rising = random[0].sort().values
    late = random[1].clone()
    late[: min(2100, classes - 1)] = -math.inf  # the whole first piece of a long row
    tied = random[2].round().clamp(max=2)
    lonely = torch.full_like(late, -math.inf)
    lonely[classes // 2] = 1
    rows = [*random, rising, rising.flip(0), late, late.flip(0), tied, tied - 1000, lonely]
    logits = relayout(torch.stack(rows), layout)
    target = torch.randint(classes, (len(rows),))
    target[::2] = logits[::2].argmax(1)
    with implementation(which):
        result = marginops.sample_statistics(logits.to(device), target.to(device))
    assert_statistics(result, brute_force.sample_statistics(logits, target), logits, target)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1, 30, 1e4])
def test_loss_matches_torch(device, dtype, which, scale):
    logits, target = random_logits(device, dtype, scale=scale)
    logits[:20, 3] = -math.inf
    logits[20:30, 5:] = -math.inf
    target[::7] = -100
    target[3] = 3  # infinite loss
    logits[5, 2] = math.nan
    logits[6] = -math.inf
    logits[8, 4] = math.inf
    with implementation(which):
        loss = marginops.sample_statistics(logits, target).loss
    expected = F.cross_entropy(logits.to(loss.dtype), target, reduction="none")
    assert loss[3] == math.inf and loss[[5, 6, 8]].isnan().all()
    # Both round x - m and log(sum), which is below 3.
    epsilon = torch.finfo(loss.dtype).eps
    torch.testing.assert_close(loss, expected, rtol=2 * epsilon, atol=8 * epsilon, equal_nan=True)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_softmax_matches_scipy_and_entropy_matches_torch(device, dtype, which, classes):
    logits, target = random_logits(device, dtype, classes=classes)
    logits[:9, 1] = -math.inf
    with implementation(which):
        result = marginops.sample_statistics(logits, target)
    exact, label = logits.double().cpu().numpy(), target.cpu().numpy()
    p = scipy.special.softmax(exact, axis=1)
    rows = np.arange(len(p))
    error = p.copy()
    error[rows, label] -= 1
    relative = rounding(logits.cpu(), target.cpu())
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy().cpu()
    for actual, expected in (
        (result.loss, scipy.special.logsumexp(exact, axis=1) - exact[rows, label]),
        (result.confidence, p[rows, label]),
        (result.entropy, scipy.special.entr(p).sum(1)),
        (result.entropy, entropy.numpy()),
        (result.el2n, np.linalg.norm(error, axis=1)),
    ):  # these formulas cancel: their absolute error is about 1e-16
        assert_within(actual, expected, relative, 4e-15)


def test_accuracy_matches_torchmetrics(device, dtype):
    logits, target = random_logits(device, dtype)
    logits = logits.round()  # ties
    correct = marginops.sample_statistics(logits, target).correct
    expected = multiclass_accuracy(
        logits[..., None],
        target[..., None],
        num_classes=10,
        average="micro",
        multidim_average="samplewise",
    )
    assert correct.tolist() == expected.bool().tolist()


@pytest.mark.parametrize("columns", [0, 1, 6])
def test_gradient_norm_matches_the_last_layer(device, columns):
    weight, bias = torch.randn(7, columns).double(), torch.randn(7).double()
    parameters = [value.to(device).requires_grad_() for value in (weight, bias)]
    input = torch.randn(30, columns, dtype=torch.float64, device=device)
    target = torch.randint(7, (30,), device=device)
    expected = []
    for sample, label in zip(input, target, strict=True):
        loss = F.cross_entropy(F.linear(sample, *parameters), label)
        gradients = torch.autograd.grad(loss, parameters)
        expected.append(math.hypot(*(float(gradient.norm()) for gradient in gradients)))
    logits = F.linear(input, *parameters).detach()
    result = marginops.sample_statistics(logits, target, input=input)
    torch.testing.assert_close(result.gradient_norm.tolist(), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_input_in_another_dtype(device, dtype, input_dtype):
    logits, target = random_logits(device, dtype)
    input = torch.randn(200, 33, device=device).to(input_dtype)
    target[4] = -100
    result = marginops.sample_statistics(logits, target, input=input)
    expected = result.el2n.double() * torch.hypot(torch.ones(()), input.double().norm(dim=1).cpu())
    epsilon = torch.finfo(result.el2n.dtype).eps
    torch.testing.assert_close(result.gradient_norm.double(), expected, rtol=8 * epsilon, atol=0)
    assert result.gradient_norm[4] == 0


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("others", [1, 40])
def test_nothing_cancels_as_the_confidence_approaches_one(device, which, wide, others):
    """One class leads equal others by d. Its and another's statistics are accurate for any d."""
    d = np.arange(0, 101, dtype=np.float64)
    logits = torch.zeros(101, 1 + others, dtype=wide)
    logits[:, 0] = torch.from_numpy(d)
    e, total = np.exp(-d), 1 + others * np.exp(-d)
    entropy = np.log1p(others * e) + others * d * e / total
    of_leader = {
        "loss": np.log1p(others * e),
        "confidence": 1 / total,
        "entropy": entropy,
        "el2n": np.sqrt(others * (1 + others)) * e / total,
    }
    of_other = {
        "loss": d + np.log1p(others * e),
        "confidence": e / total,
        "entropy": entropy,
        "el2n": np.sqrt(1 + (others - 1) * e**2 + (1 + (others - 1) * e) ** 2) / total,
    }
    limits = torch.finfo(wide)
    for label, expected in ((0, of_leader), (1, of_other)):
        with implementation(which):
            result = marginops.sample_statistics(
                logits.to(device), torch.full((101,), label, device=device)
            )
        for name, values in expected.items():
            # In float32 exponentials underflow beyond d = 87, and their squares beyond 43.
            absolute = 2 * math.sqrt(limits.tiny) if name == "el2n" else limits.tiny * 1e4
            assert_within(getattr(result, name), values, 10 * limits.eps, absolute, name)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_strides_of_target_and_kinds_of_log_norm(device, dtype, which):
    logits, target = random_logits(device, dtype)
    spread = target.repeat_interleave(3)[::3]
    assert spread.stride() == (3,)
    log_norm = torch.tensor(0.5, dtype=torch.float64, device=device)
    with implementation(which):
        expected = marginops.sample_statistics(logits, target, log_norm=0.5)
        assert_same(
            marginops.sample_statistics(logits, spread, log_norm=log_norm)[:8], expected[:8]
        )
        first = marginops.sample_statistics(logits[:1].expand(200, -1), target[:1].expand(200))
        assert_same(
            first[:8],
            marginops.sample_statistics(logits[:1].repeat(200, 1), target[:1].repeat(200))[:8],
        )


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_another_ignore_index(device, which):
    logits, target = random_logits(device, torch.float32, rows=6)
    target[2] = 7
    with implementation(which):
        result = marginops.sample_statistics(
            logits, target, input=torch.ones(6, 2, device=device), ignore_index=7
        )
    assert [field[2].item() for field in result] == [
        math.inf,
        0,
        math.inf,
        0,
        1,
        0,
        True,
        0,
        0,
        False,
    ]


@pytest.mark.parametrize("ignored", [0, 3, 12])
def test_mean_loss_and_its_gradient_are_those_of_cross_entropy(device, dtype, ignored):
    logits, weight, _ = (value.detach() for value in head(device, dtype))
    target = torch.arange(12, device=device) % 6
    target[:ignored] = -7
    features = torch.randn(12, 5, device=device).to(dtype)
    for inputs in (logits.requires_grad_(), features.requires_grad_()):
        if inputs is logits:
            statistics = marginops.sample_statistics(inputs, target, ignore_index=-7)
        else:
            statistics = marginops.linear_sample_statistics(inputs, weight, target, ignore_index=-7)
        assert statistics.counted.tolist() == (target != -7).tolist()
        value = statistics.mean_loss()
        scores = inputs if inputs is logits else F.linear(inputs, weight)
        expected = F.cross_entropy(scores.to(value.dtype), target, ignore_index=-7)
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(value, expected, equal_nan=True, **tolerance)
        (gradient,) = torch.autograd.grad(value, inputs)
        (wanted,) = torch.autograd.grad(expected, inputs)
        torch.testing.assert_close(gradient, wanted, **tolerance)


def test_statistics_print_in_one_line_without_values():
    statistics = marginops.sample_statistics(torch.randn(500, 4), torch.zeros(500).long())
    assert repr(statistics) == (
        "SampleStatistics(margin=float32[500], rival=int64[500], top2_margin=float32[500], "
        "loss=float32[500], confidence=float32[500], entropy=float32[500], correct=bool[500], "
        "el2n=float32[500], gradient_norm=None, counted=bool[500], device=cpu)"
    )
    # Reading a value would be an error here, as it would wait for a GPU there.
    on_meta = marginops.sample_statistics(
        torch.randn(5, 4, device="meta"), torch.zeros(5, device="meta").long()
    )
    assert repr(on_meta).endswith("counted=bool[5], device=meta)")
