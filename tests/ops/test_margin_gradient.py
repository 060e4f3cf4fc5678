"""Gradients of the margin family: values, ties, precision, determinism, and what is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.autograd import gradcheck, gradgradcheck

import marginops
from helpers import brute_force
from helpers.ops import IMPLEMENTATIONS, OPS, head, implementation, opcheck
from helpers.strategies import class_sum_cases, finite, score_cases
from marginops.ops import class_sum, margin_gradient, margin_pair


@pytest.mark.parametrize("rival", ["top2", "nearest"])
@pytest.mark.parametrize("bias_in_norm", [False, True])
def test_score_gradient(device, rival, bias_in_norm):
    def score(*inputs):
        return marginops.minimal_margin_score(*inputs, rival=rival, bias_in_norm=bias_in_norm)

    assert gradcheck(score, head(device))
    logits, weight, bias = head(device)
    with implementation("reference"):
        expected = torch.autograd.grad(score(logits, weight, bias).sum(), (logits, weight))
    actual = torch.autograd.grad(score(logits, weight, bias).sum(), (logits, weight))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("log_norm", [None, 0.7])
def test_margin_gradient_and_its_gradient(device, log_norm):
    logits, _, _ = head(device)
    target = torch.randint(6, (12,), device=device)
    target[3] = -100
    kept = target != -100
    norm = None if log_norm is None else torch.tensor(log_norm, dtype=torch.float64, device=device)
    inputs = (logits,) if norm is None else (logits, norm.requires_grad_())

    def margin(logits, log_norm=None):
        return marginops.classification_margin(logits, target, log_norm=log_norm)[kept]

    assert gradcheck(margin, inputs)
    assert gradgradcheck(margin, inputs)


@pytest.mark.parametrize("classes", [3, 64])
def test_gradient_in_low_precision_matches_float64(device, dtype, classes):
    logits, weight, _ = (value.detach().to(dtype) for value in head(device, classes=classes))
    inputs = logits.requires_grad_(), weight.requires_grad_()
    exact = tuple(value.detach().double().requires_grad_() for value in inputs)
    for values in (inputs, exact):
        marginops.minimal_margin_score(*values).sum().backward()
    for value, wanted in zip(inputs, exact, strict=True):
        assert value.grad.dtype == dtype
        epsilon = max(torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
        torch.testing.assert_close(
            value.grad.double(), wanted.grad, rtol=8 * epsilon, atol=8 * epsilon
        )


def test_ties_and_ignored_samples_in_gradients(device):
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 0.0, 0.0], [5.0, 1.0, 1.0, 0.0]])
    logits = logits.to(device).requires_grad_()
    target = torch.tensor([0, 1, -100], device=device)
    marginops.classification_margin(logits, target).sum().backward()
    assert logits.grad.tolist() == [[1, -1, 0, 0], [-1, 1, 0, 0], [0, 0, 0, 0]]
    logits.grad = None
    weight = torch.eye(4, device=device)
    marginops.minimal_margin_score(logits, weight).sum().backward()
    side = 1 / math.sqrt(2)
    expected = [[0, side, -side, 0], [side, -side, 0, 0], [side, -side, 0, 0]]
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor(expected))


def test_gradient_is_zero_where_the_boundary_has_no_direction(device):
    logits = torch.tensor([[1.0, 0.5, 0.0]], device=device, requires_grad=True)
    weight = torch.ones(3, 2, device=device, requires_grad=True)
    score = marginops.minimal_margin_score(logits, weight)
    assert score.tolist() == [math.inf]
    score.backward()
    assert not logits.grad.any() and not weight.grad.any()


def test_weight_gradient_has_the_same_bits_in_every_run(device):
    logits, weight, bias = head(device, torch.float32, rows=4000, classes=7, columns=65)
    runs = set()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        score = marginops.minimal_margin_score(logits, weight, bias, bias_in_norm=True)
        gradients = torch.autograd.grad(score.square().sum(), (weight, bias))
        runs.add(tuple(value.cpu().numpy().tobytes() for value in gradients))
    assert len(runs) == 1


def test_second_derivative_of_the_score_is_an_error(device):
    logits, weight, _ = head(device)
    score = marginops.minimal_margin_score(logits, weight).sum()
    (gradient,) = torch.autograd.grad(score, weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_autocast_head(device):
    kind = torch.device(device).type
    layer = torch.nn.Linear(16, 10, device=device)
    features = torch.randn(64, 16, device=device)
    with torch.autocast(kind, dtype=torch.bfloat16):
        logits = layer(features)
        assert logits.dtype == torch.bfloat16
        score = marginops.minimal_margin_score(logits, layer.weight, layer.bias, bias_in_norm=True)
        score.sum().backward()
    assert score.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32
    expected = marginops.minimal_margin_score(
        logits.float(), layer.weight, layer.bias, bias_in_norm=True
    )
    torch.testing.assert_close(score, expected)


@given(case=score_cases(finite))
def test_gradient_touches_one_pair_of_classes(device, case):
    logits, weight, _ = (value if value is None else value.to(device) for value in case)
    logits = logits.detach().requires_grad_()
    marginops.minimal_margin_score(logits, weight).sum().backward()
    assert ((logits.grad != 0).sum(1) <= 2).all()
    assert not logits.grad.sum(1).any()


def test_forward_mode_is_an_error_and_not_zero(device):
    logits, weight, _ = (value.detach() for value in head(device))
    with pytest.raises(NotImplementedError, match="minimal_margin_score: no forward-mode"):
        torch.func.jvp(
            lambda logits: marginops.minimal_margin_score(logits, weight), (logits,), (logits,)
        )


def test_second_derivative_in_logits(device):
    logits, weight, _ = head(device)
    weight = weight.detach()
    assert gradgradcheck(lambda logits: marginops.minimal_margin_score(logits, weight), (logits,))


def test_vectorized_jacobian(device):
    logits, weight, _ = (value.detach() for value in head(device))
    target = torch.randint(6, (12,), device=device)
    for function in (
        lambda logits: marginops.classification_margin(logits, target),
        lambda logits: marginops.minimal_margin_score(logits, weight),
    ):
        batched = torch.autograd.functional.jacobian(function, logits, vectorize=True)
        assert torch.equal(batched, torch.autograd.functional.jacobian(function, logits))


def test_results_may_be_changed_in_place(device):
    logits, weight, _ = head(device)
    target = torch.randint(6, (12,), device=device)
    weight = weight.detach()
    marginops.minimal_margin_score(logits, weight).clamp_(max=1).sum().backward()
    marginops.classification_margin(logits, target).mul_(2).sum().backward()
    marginops.select_minimal_margin(logits, weight, k=3).scores.mul_(2).sum().backward()
    marginops.select_classification_margin(logits, target, 3).scores.mul_(2).sum().backward()
    assert logits.grad.any()


def test_direct_calls_of_the_pair_gradient_with_wrong_keys():
    weight, coefficient = torch.zeros(2, 2), torch.ones(3)
    for key in ([0, 10**12, 3], [-1, 0, 1], [0, 1, 4]):
        with pytest.raises(RuntimeError, match=r"key: expected .*values"):
            OPS.pair_gradient(torch.tensor(key), coefficient, weight, None)
    key = torch.tensor([0, 1, 3])
    for bias in (torch.zeros(1), torch.zeros(2).double(), torch.zeros(2, 1)):
        with pytest.raises(RuntimeError, match="bias: expected"):
            OPS.pair_gradient(key, coefficient, weight, bias)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=class_sum_cases())
def test_class_sum_gradient_matches_brute_force(device, which, case):
    *tensors, classes = case
    key, coefficient, rows = (value.to(device) for value in tensors)
    with implementation(which):
        result = class_sum.class_sum_op(key, coefficient, rows, classes)
    assert result.dtype == coefficient.dtype
    # A sum has at most 40 terms, each of a few units.
    absolute = 100 * torch.finfo(result.dtype).eps
    expected = brute_force.class_sum(*case)
    np.testing.assert_allclose(result.double().cpu().numpy(), expected, rtol=0, atol=absolute)


def test_class_sum_adds_in_order_with_any_number_of_threads(device):
    rows = torch.randn(300, 65, device=device)
    key = torch.randint(20 * 300, (100_000,)).sort().values
    coefficient = torch.randn(100_000)
    expected = torch.zeros(20, 65)
    expected.index_add_(0, key // 300, coefficient.unsqueeze(1) * rows.cpu()[key % 300])
    sums = set()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        result = OPS.class_sum(key.to(device), coefficient.to(device), rows, 20)
        sums.add(result.cpu().numpy().tobytes())
        # A class has 5000 terms in the same order; a kernel may fuse multiplications and additions.
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-5, atol=2e-4)
    assert len(sums) == 1


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=score_cases(finite))
def test_pair_distance_matches_minimal_margin_pair(device, which, case):
    logits, weight, bias = (value if value is None else value.to(device) for value in case)
    with implementation(which):
        pair, distance = margin_pair.minimal_margin_pair_op(logits, weight, bias, None, False)
        swapped = pair.repeat(1, 2)[:, 1:3]
        for classes in (pair, pair.T.contiguous().T, swapped):
            result = margin_pair.pair_distance_op(weight, bias, classes)
            assert torch.equal(result.to(distance.dtype), distance)
    expected = brute_force.pair_distance(case[1], case[2], pair.cpu())
    tolerance = 1e-12 if weight.dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(result.double().cpu().numpy(), expected, rtol=tolerance)


def test_opcheck_of_the_ops_behind_gradients(device):
    rows = torch.randn(4, 3, dtype=torch.float64, device=device)
    key = torch.tensor([0, 3, 3, 11, 19], device=device)
    coefficient = torch.randn(5, dtype=torch.float64, device=device)
    opcheck("class_sum", key, coefficient, rows, 5)
    opcheck("class_sum", key[:0], coefficient[:0].float(), rows.half(), 2)
    pair = torch.tensor([[0, 1], [3, 3], [2, 0]], device=device)
    for bias in (None, rows[:, 0]):
        opcheck("pair_distance", rows, bias, pair)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_empty_class_sums(device, which):
    key = torch.empty(0, dtype=torch.int64, device=device)
    for count, columns, classes in ((0, 3, 2), (4, 0, 2), (4, 3, 0), (4, 3, 2), (0, 0, 0)):
        rows = torch.randn(count, columns, device=device)
        with implementation(which):
            result = class_sum.class_sum_op(key, torch.empty(0, device=device), rows, classes)
        assert torch.equal(result, torch.zeros(classes, columns, device=device))


def test_direct_calls_of_the_class_sum_with_wrong_keys():
    rows, coefficient = torch.zeros(2, 5), torch.ones(3)
    for key in ([0, 10**12, 3], [-1, 0, 1], [0, 1, 6], [2, 1, 0]):
        with pytest.raises(RuntimeError, match=r"key: expected .*values"):
            OPS.class_sum(torch.tensor(key), coefficient, rows, 3)
    key = torch.tensor([0, 1, 3])
    for wrong in (torch.ones(2), torch.ones(3).double(), torch.ones(3, 1)):
        with pytest.raises(RuntimeError, match="expected"):
            OPS.class_sum(key, wrong, rows, 3)
    with pytest.raises(RuntimeError, match="expected"):
        OPS.class_sum(key.int(), coefficient, rows, 3)
    for wrong in (rows[0], rows.long(), rows[:0]):
        with pytest.raises(RuntimeError, match="expected"):
            OPS.class_sum(key, coefficient, wrong, 3)
    # 20 * 2**60 overflows 64 bits and gives 2**62.
    for many, classes in ((rows, -1), (rows[:1].expand(2**60, 5), 20)):
        with pytest.raises(RuntimeError, match="classes: expected"):
            OPS.class_sum(key, coefficient, many, classes)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_keys_and_coefficients_with_strides(device, which):
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device)
    key = torch.tensor([[0, 9], [1, 9], [3, 9]], device=device)[:, 0]
    coefficient = torch.tensor([[1.0, 9.0], [2.0, 9.0], [4.0, 9.0]], device=device)[:, 0]
    with implementation(which):
        sums = class_sum.class_sum_op(key, coefficient, rows, 2)
        gradient, _ = margin_gradient.pair_gradient_op(key, coefficient, rows, None)
    assert sums.tolist() == [[7.0, 12.0], [12.0, 20.0]]
    assert gradient.tolist() == [[-4.0, -6.0], [0.0, 0.0]]


def test_direct_calls_of_the_pair_distance_with_wrong_keys():
    weight = torch.zeros(3, 2)
    for pair in ([[0, 3]], [[-1, 0]], [[0, 1], [10**12, 2]]):
        with pytest.raises(RuntimeError, match="pair: expected"):
            OPS.pair_distance(weight, None, torch.tensor(pair))
    pair = torch.tensor([[0, 1]])
    for wrong in (pair[0], pair.int(), torch.tensor([[0, 1, 2]])):
        with pytest.raises(RuntimeError, match="pair: expected"):
            OPS.pair_distance(weight, None, wrong)
    for bias in (torch.zeros(1), torch.zeros(3).double(), torch.zeros(3, 1)):
        with pytest.raises(RuntimeError, match="bias: expected"):
            OPS.pair_distance(weight, bias, pair)
