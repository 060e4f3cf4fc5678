"""Multi-margin regularization: values, gradients, rivals with and without logits, the schedule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import marginops
from helpers import brute_force
from helpers.ops import IMPLEMENTATIONS, OPS, implementation, opcheck
from helpers.strategies import linear_cases
from marginops import multi_margin_regularization
from marginops._checks import result_dtype
from marginops.nn import MultiMarginRegularization

REDUCTIONS = ["square_of_mean", "mean_of_square"]


def by_hand(input, weight, target, logits, reduction, ignore_index=-100):
    """The definition, sample by sample, in Python's floats."""
    rivals = brute_force.rivals(logits, target, ignore_index)
    rows, weights = input.double().tolist(), weight.double().tolist()
    radius, distances = 0.0, []
    for features, y, rival in zip(rows, target.tolist(), rivals, strict=True):
        if y != ignore_index:
            radius = max(radius, math.hypot(*features))
            distances.append(math.dist(weights[y], weights[rival]))
    if not distances:
        return math.nan
    if reduction == "mean_of_square":
        return math.fsum((radius * d) ** 2 for d in distances) / len(distances)
    return (radius * math.fsum(distances) / len(distances)) ** 2


def eager(input, weight, target, logits, reduction):
    """The same in plain PyTorch, with gradients by autograd."""
    rival = logits.scatter(1, target[:, None], -torch.inf).argmax(1)
    distance = (weight[target] - weight[rival]).norm(dim=1)
    radius = input.norm(dim=1).max()
    if reduction == "mean_of_square":
        return (radius * distance).square().mean()
    return (radius * distance.mean()).square()


def case(device, dtype=torch.float64, samples=20, features=5, classes=6):
    input = torch.randn(samples, features, dtype=torch.float64).to(dtype).to(device)
    weight = torch.randn(classes, features, dtype=torch.float64).to(dtype).to(device)
    target = torch.randint(classes, (samples,), device=device)
    return input.requires_grad_(), weight.requires_grad_(), target


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(case=linear_cases(), given_logits=st.booleans())
def test_matches_brute_force(device, which, reduction, case, given_logits):
    input, weight, bias, target, _ = (v.to(device) if torch.is_tensor(v) else v for v in case)
    whole = input.isfinite().all(1)
    input, target = input[whole], target[whole]
    # Small integers: the logits are exact in every dtype, and often equal.
    logits = input.double() @ weight.double().t() + (0 if bias is None else bias.double())
    heads = {"logits": logits.to(input.dtype)} if given_logits else {"bias": bias}
    with implementation(which):
        value = multi_margin_regularization(input, weight, target, reduction=reduction, **heads)
    assert value.shape == () and value.dtype == result_dtype(input.dtype)
    expected = by_hand(input, weight, target, logits, reduction)
    expected = torch.tensor(expected, dtype=value.dtype, device=device)
    epsilon = 30 * torch.finfo(value.dtype).eps
    torch.testing.assert_close(value, expected, rtol=epsilon, atol=0, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_logits", [True, False])
def test_gradient(device, reduction, with_logits):
    input, weight, target = case(device)
    logits = torch.randn(20, 6, dtype=torch.float64, device=device) if with_logits else None
    rivals = logits if with_logits else (input @ weight.t()).detach()

    def ours(input, weight, keep=slice(None)):
        return multi_margin_regularization(
            input[keep], weight, target[keep], logits=rivals[keep], reduction=reduction
        )

    # The rivals are fixed: without logits a small step of the weight might change them.
    assert gradcheck(ours, (input, weight))
    value = multi_margin_regularization(input, weight, target, logits=logits, reduction=reduction)
    expected = eager(input, weight, target, rivals, reduction)
    torch.testing.assert_close(value, expected)
    inputs = input, weight
    wanted = torch.autograd.grad(expected, inputs)
    torch.testing.assert_close(torch.autograd.grad(value, inputs, retain_graph=True), wanted)
    assert (wanted[0] != 0).any(1).sum() == 1
    for one in inputs:
        (alone,) = torch.autograd.grad(value, one, retain_graph=True)
        torch.testing.assert_close(alone, wanted[0] if one is input else wanted[1])
    target[::3] = -100
    kept = target != -100
    value = multi_margin_regularization(
        input, weight, target, logits=rivals * 2, reduction=reduction
    )
    torch.testing.assert_close(
        torch.autograd.grad(value, inputs), torch.autograd.grad(ours(*inputs, kept), inputs)
    )


def test_gradient_in_low_precision_matches_float64(device, dtype):
    input, weight, target = case(device, dtype)
    logits = torch.randn(20, 6, device=device)
    exact = tuple(value.detach().double().requires_grad_() for value in (input, weight))
    multi_margin_regularization(input, weight, target, logits=logits).backward()
    multi_margin_regularization(*exact, target, logits=logits).backward()
    for value, wanted in zip((input, weight), exact, strict=True):
        assert value.grad.dtype == dtype
        epsilon = 8 * max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
        scale = float(wanted.grad.abs().max())
        torch.testing.assert_close(
            value.grad.double(), wanted.grad, rtol=epsilon, atol=epsilon * scale
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_gradient_of_features_and_weights_of_any_size(device, reduction, size):
    """The value equals that of size 1 even if float32 cannot hold the squared mean distance."""
    input, weight, target = case(device)
    logits = (input @ weight.t()).detach()
    value = multi_margin_regularization(input, weight, target, logits=logits, reduction=reduction)
    wanted = torch.autograd.grad(value, (input, weight))
    scaled = [
        (v.detach() * s).float().requires_grad_() for v, s in ((input, size), (weight, 1 / size))
    ]
    actual = multi_margin_regularization(*scaled, target, logits=logits, reduction=reduction)
    torch.testing.assert_close(actual.double(), value, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(actual, scaled)
    for gradient, expected, s in zip(gradients, wanted, (size, 1 / size), strict=True):
        torch.testing.assert_close(gradient.double() * s, expected, rtol=1e-4, atol=1e-4)


def test_closed_form_of_an_orthonormal_head(device):
    input = torch.eye(4, device=device) * torch.tensor([1.0, 3.0, 2.0, 3.0], device=device)
    input.requires_grad_()
    weight = torch.eye(4, device=device).requires_grad_()
    target = torch.tensor([0, 1, 2, 0], device=device)
    value = multi_margin_regularization(input, weight, target)
    assert value.item() == pytest.approx(9 * 2)
    value.backward()
    # 2 R mean**2 h / R in the first of the two longest rows.
    assert input.grad.nonzero().tolist() == [[1, 1]]
    assert input.grad[1, 1].item() == pytest.approx(2 * 3 * 2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_invariances(device, reduction):
    input, weight, target = case(device)
    logits = (input @ weight.t()).detach()

    def value(input, weight, logits=logits):
        return multi_margin_regularization(
            input, weight, target, logits=logits, reduction=reduction
        )

    expected = value(input, weight)
    torch.testing.assert_close(value(input * 1e3, weight / 1e3), expected)
    shift = torch.randn(5, dtype=torch.float64, device=device)
    torch.testing.assert_close(value(input, weight + shift), expected)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, device=device)).Q
    torch.testing.assert_close(value(input @ turn, weight @ turn, None), expected)
    # The logits only decide the rivals.
    torch.testing.assert_close(value(input, weight, logits.exp()), expected)


def test_bias_is_part_of_the_logits_only(device):
    input, weight, target = case(device)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 50.0], dtype=torch.float64, device=device)
    value = multi_margin_regularization(input, weight, target, bias=bias)
    logits = input @ weight.t() + bias
    torch.testing.assert_close(
        value, multi_margin_regularization(input, weight, target, logits=logits)
    )
    assert not torch.allclose(value, multi_margin_regularization(input, weight, target))


def test_without_samples_or_direction(device, dtype):
    input, weight, target = case(device, dtype)
    nothing = torch.full_like(target, -100)
    value = multi_margin_regularization(input, weight, nothing)
    assert value.isnan() and value.dtype == result_dtype(dtype)
    empty = input.detach()[:0].requires_grad_()
    value = multi_margin_regularization(empty, weight, target[:0])
    value.backward()
    assert value.isnan() and empty.grad.shape == empty.shape and not weight.grad.any()
    # Equal rows have no distance, and no direction in which to push them.
    same = torch.ones_like(weight).requires_grad_()
    for reduction in REDUCTIONS:
        value = multi_margin_regularization(input, same, target, reduction=reduction)
        value.backward()
        assert value == 0 and not same.grad.any() and not input.grad.any()


def test_nan_reaches_the_value(device):
    input, weight, target = case(device, torch.float32)
    logits = torch.randn(20, 6, device=device)
    broken = logits.clone()
    broken[3, 1] = math.nan
    assert multi_margin_regularization(input, weight, target, logits=broken).isnan()
    target[3] = -100
    assert multi_margin_regularization(input, weight, target, logits=broken).isfinite()
    with torch.no_grad():
        input[5, 2] = math.nan
    assert multi_margin_regularization(input, weight, target, logits=logits).isnan()


def test_opcheck(device):
    input, weight, target = case(device)
    target[2] = -1
    margin, rival = OPS.classification_margin_rival(
        torch.randn(20, 6, device=device), target, None, None, -1
    )
    for mean_of_square in (False, True):
        arguments = input, weight, target, rival, margin, mean_of_square, -1
        opcheck("multi_margin_regularization", *arguments)
        detached = [a.detach() if torch.is_tensor(a) else a for a in arguments]
        _, *saved = OPS.multi_margin_regularization(*detached)
        grad = torch.tensor(0.5, dtype=torch.float64, device=device)
        for needed in ((True, True), (False, True), (True, False)):
            opcheck(
                "multi_margin_regularization_gradient",
                *(grad, *detached[:4], *saved, mean_of_square, -1, *needed),
            )


def test_compiles(device):
    input, weight, target = case(device, torch.float32)
    module = MultiMarginRegularization(5).to(device)
    module.set_epoch(1)

    def loss(input, weight, logits=None):
        return module(input, weight, target, logits)

    logits = torch.randn(20, 6, device=device)
    for arguments in ((input, weight), (input, weight, logits)):
        value = torch.compile(loss, fullgraph=True)(*arguments)
        torch.testing.assert_close(value, loss(*arguments))
        actual = torch.autograd.grad(value, (input, weight))
        torch.testing.assert_close(actual, torch.autograd.grad(loss(*arguments), (input, weight)))


def test_second_derivative_is_an_error(device):
    input, weight, target = case(device)
    value = multi_margin_regularization(input, weight, target)
    (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_every_run_gives_the_same_bits(device):
    input, weight, target = case(device, torch.float32, samples=3000, features=65, classes=9)
    runs = set()
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        value = multi_margin_regularization(input, weight, target)
        tensors = value.detach(), *torch.autograd.grad(value, (input, weight))
        runs.add(tuple(tensor.cpu().numpy().tobytes() for tensor in tensors))
    assert len(runs) == 1


def test_autocast(device):
    layer = torch.nn.Linear(16, 10, device=device)
    features, target = torch.randn(64, 16, device=device), torch.randint(10, (64,), device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        logits = layer(features)
        given = multi_margin_regularization(
            features.bfloat16(), layer.weight, target, logits=logits
        )
        found = multi_margin_regularization(features, layer.weight, target, bias=layer.bias)
        (given + found).backward()
    assert given.dtype == found.dtype == torch.float32
    rivals = multi_margin_regularization(features, layer.weight, target, logits=logits)
    torch.testing.assert_close(found, rivals)
    torch.testing.assert_close(given, rivals, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, r"input: expected a tensor \[N, D\], got list"),
        ({"input": torch.ones(3, 2)}, ValueError, "input: expected 4 rows for logits"),
        ({"weight": torch.ones(3, 3)}, ValueError, r"weight: expected shape \[3, 2\] for logits"),
        ({"weight": torch.ones(2, 2)}, ValueError, r"weight: expected shape \[3, 2\] for logits"),
        ({"weight": torch.ones(3, 2).double()}, TypeError, "weight: expected dtype torch.float32"),
        ({"weight": torch.ones(1, 2), "logits": None}, ValueError, "at least 2 classes"),
        ({"weight": torch.ones(3, 3), "logits": None}, ValueError, "weight: expected 2 columns"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected dtype torch.int64"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \[4\]"),
        ({"target": torch.full((4,), 3)}, RuntimeError, r"target: expected classes in \[0, 3\)"),
        ({"logits": torch.ones(4, 1)}, ValueError, "logits: expected at least 2 classes"),
        ({"bias": torch.ones(2)}, ValueError, r"bias: expected shape \[3\]"),
        ({"bias": torch.ones(2), "logits": None}, ValueError, r"bias: expected shape \[3\]"),
        ({"reduction": "mean"}, ValueError, 'reduction: expected "square_of_mean" or'),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int, got float"),
    ],
)
def test_wrong_arguments(changed, error, message):
    arguments = {
        "input": torch.ones(4, 2),
        "weight": torch.ones(3, 2),
        "target": torch.zeros(4).long(),
        "logits": torch.ones(4, 3),
    }
    with pytest.raises(error, match=message):
        multi_margin_regularization(**{**arguments, **changed})


def test_schedule_and_its_state(device):
    module = MultiMarginRegularization(5, 0.1, 0.5).to(device)
    alphas = []
    for epoch in range(7):
        module.set_epoch(epoch)
        alphas.append(module.alpha.item())
    assert alphas == pytest.approx([0, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5], rel=1e-15)
    assert module.alpha.device == torch.device(device)
    input, weight, target = case(device)
    module.set_epoch(2)
    resumed = MultiMarginRegularization(5, 0.1, 0.5).to(device)
    assert resumed(input, weight, target) == 0
    resumed.load_state_dict(module.state_dict())
    expected = 0.3 * marginops.multi_margin_regularization(input, weight, target)
    torch.testing.assert_close(resumed(input, weight, target), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "epochs: expected at least 1, got 0"),
        ((2.0,), TypeError, "epochs: expected an int, got float"),
        ((5, -1.0), ValueError, "alpha_start: expected a finite value of at least 0"),
        ((5, 0.1, math.inf), ValueError, "alpha_end: expected a finite value of at least 0"),
        ((5, "1"), TypeError, "alpha_start: expected a float, got str"),
    ],
)
def test_wrong_schedules(arguments, error, message):
    with pytest.raises(error, match=message):
        MultiMarginRegularization(*arguments)
    with pytest.raises(ValueError, match="reduction: expected"):
        MultiMarginRegularization(5, reduction="sum")
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        MultiMarginRegularization(5).set_epoch(-1)
