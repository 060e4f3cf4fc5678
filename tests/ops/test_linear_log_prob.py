"""Log-probabilities and entropies of a linear head equal those of PyTorch with all logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import marginops
from helpers.linear_calls import chunk_of, differentiable, exact_head, random_head

TEMPERATURES = [1.0, 0.7, 2]


def plain(head, temperature=1.0) -> tuple[Tensor, Tensor]:
    """As libraries of language models compute them, in float64 from logits in their own dtype."""
    logits = F.linear(head.input, head.weight, head.bias).double() / temperature
    log_p = logits.log_softmax(-1)
    kept = head.target != -100
    own = log_p.gather(-1, torch.where(kept, head.target, 0).unsqueeze(-1)).squeeze(-1)
    entropy = torch.logsumexp(logits, -1) - (log_p.exp() * logits).sum(-1)
    return torch.where(kept, own, 0), torch.where(kept, entropy, 0)


def fused(head, temperature=1.0, **options) -> tuple[Tensor, Tensor]:
    return marginops.linear_log_prob(
        *head[:2], head.target, head.bias, temperature=temperature, return_entropy=True, **options
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [3, None], ids=["several tiles", "one tile"])
def test_values(device, dtype, temperature, bias, rows):
    head = exact_head(device, dtype, bias=bias)
    chunk_bytes = None if rows is None else chunk_of(rows, head)
    # Dividing the features rounds them, and so the logits.
    largest = float(F.linear(head.input.abs(), head.weight.abs()).max()) / temperature
    rounding = 2 * torch.finfo(dtype).eps * (0 if temperature in (1, 2) else largest)
    for actual, expected in zip(
        fused(head, temperature, chunk_bytes=chunk_bytes), plain(head, temperature), strict=True
    ):
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        exact = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(actual.double(), expected, rtol=exact, atol=exact + rounding)
    alone = marginops.linear_log_prob(
        *head[:2], head.target, head.bias, temperature=temperature, chunk_bytes=chunk_bytes
    )
    assert torch.equal(alone, fused(head, temperature, chunk_bytes=chunk_bytes)[0])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_gradients(device, temperature, chunk_rows):
    head = differentiable(random_head(device, rows=30, columns=8))
    chunk_bytes = None if chunk_rows is None else chunk_of(chunk_rows, head)

    def gradients(results):
        total = (results[0] * torch.arange(30.0, device=device)).sum() - 2 * results[1].sum()
        return torch.autograd.grad(total, head.differentiable())

    actual = gradients(fused(head, temperature, chunk_bytes=chunk_bytes))
    torch.testing.assert_close(actual, gradients(plain(head, temperature)))


def test_gradcheck(device):
    head = differentiable(random_head(device, rows=4, classes=5, columns=3))

    def call(*layer):
        return fused(head._replace(input=layer[0].view(2, 2, 3), target=target), 0.7)

    target = head.target.view(2, 2)

    def ordered(input, weight, bias):
        return marginops.linear_log_prob(
            input.view(2, 2, 3), weight, target, bias, temperature=0.7, return_entropy=True
        )

    assert torch.autograd.gradcheck(ordered, head[:3])
    log_prob, _ = call(*head[:3])
    (gradient,) = torch.autograd.grad(log_prob.sum(), head.input, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_as_exact_as_the_composition(device, product):
    """Against the exact values of features and weights that are rounded already."""
    shape = (400, 64, 500)
    input = torch.randn(shape[0], shape[1], device=device).to(product)
    weight = torch.randn(shape[2], shape[1], device=device).div(4).to(product)
    target = torch.randint(shape[2], shape[:1], device=device)

    def own(logits):
        return logits.double().log_softmax(-1).gather(1, target[:, None]).squeeze(1)

    exact = own(F.linear(input.double(), weight.double()) / 0.7)
    composed = (own(F.linear(input, weight) / 0.7) - exact).square().mean().sqrt()
    half = marginops.linear_log_prob(input, weight, target, temperature=0.7)
    with torch.autocast(torch.device(device).type, product):
        mixed = marginops.linear_log_prob(input.float(), weight.float(), target, temperature=0.7)
    for actual in (half, mixed):
        assert actual.dtype == torch.float32
        assert (actual - exact).square().mean().sqrt() <= 1.1 * composed


def test_ignored_tokens(device):
    head = differentiable(exact_head(device))
    ignored = head.target == -100
    log_prob, entropy = fused(head, 0.7)
    assert ignored.any()
    assert (log_prob[ignored] == 0).all() and not log_prob[ignored].signbit().any()
    assert (entropy[ignored] == 0).all()
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), head.input)
    assert (gradient[ignored] == 0).all() and (gradient[~ignored] != 0).any(1).all()
    other = marginops.linear_log_prob(*head[:2], torch.where(ignored, 3, head.target), head.bias)
    three = marginops.linear_log_prob(
        *head[:2], torch.where(ignored, 3, head.target), head.bias, ignore_index=3
    )
    assert (other[ignored] != 0).all() and (three[ignored] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_tokens(device, shape):
    weight = torch.randn(5, 4, device=device, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.int64, device=device)
    log_prob = marginops.linear_log_prob(torch.randn(*shape, 4, device=device), weight, target)
    assert log_prob.shape == shape
    log_prob.sum().backward()
    assert (weight.grad == 0).all()


def test_special_values(device):
    weight = torch.eye(4, device=device)
    input = torch.zeros(4, 4, device=device)
    input[0, 2], input[1, 1], input[2, 3] = math.nan, math.inf, -200
    target = torch.full((4,), 3, device=device)
    log_prob, entropy = marginops.linear_log_prob(input, weight, target, return_entropy=True)
    # 0 * inf is NaN, so the second row has a NaN as well.
    assert log_prob[:2].isnan().all() and entropy[:2].isnan().all()
    assert log_prob[2:].tolist() == pytest.approx([-200 - math.log(3), -math.log(4)])
    bias = torch.tensor([0.0, -math.inf, 1.0, 2.0], device=device)
    never = marginops.linear_log_prob(input[3:], weight, target[3:] - 2, bias)
    assert never.tolist() == [-math.inf]


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (0, ValueError, "expected a finite number above 0, got 0"),
        (-1.0, ValueError, "expected a finite number above 0, got -1.0"),
        (math.inf, ValueError, "expected a finite number above 0, got inf"),
        (math.nan, ValueError, "expected a finite number above 0, got nan"),
        (True, TypeError, "expected a float, got bool"),
        ("1", TypeError, "expected a float, got str"),
        (None, TypeError, "expected a float, got NoneType"),
        (torch.tensor(1.0), TypeError, r"expected a float, got Tensor; pass float\(temperature\)"),
    ],
)
def test_wrong_temperature(temperature, error, message):
    with pytest.raises(error, match=f"^temperature: {message}"):
        fused(exact_head("cpu"), temperature)
