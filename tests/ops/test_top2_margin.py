"""Minimal margins without a weight: of logits and of probabilities, alone and with selection."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import marginops
from helpers import brute_force
from helpers.ops import DTYPES, IMPLEMENTATIONS, head, implementation, opcheck
from helpers.strategies import LAYOUTS, anything, dtypes, relayout, tensors

SOFTMAX = pytest.mark.parametrize("softmax", [False, True], ids=["logits", "probabilities"])
WHICH = pytest.mark.parametrize("which", IMPLEMENTATIONS)
INFINITE = torch.tensor(
    [
        [math.inf, 1.0, 2.0],
        [1.0, -math.inf, -math.inf],
        [math.inf, math.inf, 1.0],
        [-math.inf, -math.inf, -math.inf],
        [math.nan, 1.0, 2.0],
        [1.0, 1.0, -math.inf],
    ]
)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-14 if dtype == torch.float64 else 2e-6


def probability_margin(logits: torch.Tensor) -> torch.Tensor:
    first, second = logits.softmax(1).topk(2, dim=1).values.unbind(1)
    return first - second


@st.composite
def cases(draw):
    rows, classes = draw(st.integers(0, 12)), draw(st.sampled_from([2, 3, 10, 17, 49, 130]))
    return draw(tensors(rows, classes, draw(dtypes), anything))


@WHICH
@SOFTMAX
@given(logits=cases())
def test_margin_matches_brute_force(device, which, softmax, logits):
    with implementation(which):
        margin = marginops.minimal_margin_score(logits.to(device), softmax=softmax)
    assert margin.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    expected = brute_force.top2_margin(logits, softmax)
    np.testing.assert_allclose(
        margin.double().cpu().numpy(), expected, rtol=tolerance(logits.dtype), atol=0
    )
    assert not margin.signbit().logical_and(margin == 0).any()


@pytest.mark.parametrize("classes", [2, 10, 48, 49, 64, 65, 127, 129, 1000, 2049, 8193, 20001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_around_every_boundary(device, dtype, classes, layout):
    logits = relayout(torch.randn(37, classes).mul(4).round().div(4).to(dtype), layout)
    first, second = logits.double().topk(2, dim=1).values.unbind(1)
    margin = marginops.minimal_margin_score(logits.to(device)).double().cpu()
    torch.testing.assert_close(margin, first - second, rtol=0, atol=0)
    margin = marginops.minimal_margin_score(logits.to(device), softmax=True).double().cpu()
    expected = probability_margin(logits.double())
    # A thread may add all 20001 terms of a row, each rounded.
    rounding = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(margin, expected, rtol=rounding, atol=1e-16)


@WHICH
@pytest.mark.parametrize("classes", [2, 20, 300])
def test_tiny_margins_of_probabilities_are_accurate(device, which, classes):
    logits = torch.randn(50, classes).clamp(max=0)
    logits[:, 0] = torch.rand(50) / 100 + 0.01  # e to the power of the difference rounds to 1
    logits[:, -1] = torch.nextafter(logits[:, 0], torch.zeros(50))
    with implementation(which):
        margin = marginops.minimal_margin_score(logits.to(device), softmax=True).cpu()
    expected = brute_force.top2_margin(logits, softmax=True)
    assert (expected < 1e-7).all() and (expected > 0).all()
    np.testing.assert_allclose(margin.double().numpy(), expected, rtol=tolerance(logits.dtype))


@WHICH
@pytest.mark.parametrize("classes", [3, 60, 200, 5000])
def test_infinities_and_nan(device, which, classes):
    logits = torch.full((6, classes), -math.inf)
    logits[:, [0, classes // 2, classes - 1]] = INFINITE
    with implementation(which):
        plain = marginops.minimal_margin_score(logits.to(device)).cpu()
        softmax = marginops.minimal_margin_score(logits.to(device), softmax=True).cpu()
    nan, inf = math.nan, math.inf
    torch.testing.assert_close(plain, torch.tensor([inf, inf, nan, nan, nan, 0]), equal_nan=True)
    torch.testing.assert_close(softmax, torch.tensor([1, 1, nan, nan, nan, 0.0]), equal_nan=True)


def test_probabilities_match_numpy(device):
    logits = 5 * torch.randn(300, 11, dtype=torch.float64)
    largest = np.sort(scipy.special.softmax(logits.numpy(), axis=1), axis=1)
    margin = marginops.minimal_margin_score(logits.to(device), softmax=True)
    np.testing.assert_allclose(margin.cpu().numpy(), largest[:, -1] - largest[:, -2], rtol=1e-10)


class KnownProbabilities:
    """A classifier of other libraries whose samples are their own probabilities."""

    @staticmethod
    def predict_proba(samples: np.ndarray) -> np.ndarray:
        return samples


def modal_query(probabilities, k):
    uncertainty = pytest.importorskip("modAL.uncertainty")
    chosen, _ = uncertainty.margin_sampling(KnownProbabilities, probabilities, n_instances=k)
    return uncertainty.classifier_margin(KnownProbabilities, probabilities), chosen


def small_text_query(probabilities, k):
    strategy = pytest.importorskip("small_text").BreakingTies()
    every = np.arange(len(probabilities))
    pool = (probabilities, every, np.array([], int), np.array([], int))
    chosen = strategy.query(KnownProbabilities, *pool, n=k)
    return strategy.get_confidence(KnownProbabilities, *pool), chosen


def cleanlab_query(probabilities, k):
    rank = pytest.importorskip("cleanlab.rank")
    labels = probabilities.argmax(1)
    quality = rank.get_normalized_margin_for_each_label(labels, probabilities)
    return 2 * quality - 1, np.argsort(quality, kind="stable")[:k]


@pytest.mark.parametrize("query", [modal_query, small_text_query, cleanlab_query])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_probabilities_match_other_libraries(device, query, classes):
    logits = 3 * torch.randn(400, classes, dtype=torch.float64)
    margin, chosen = query(logits.softmax(1).numpy(), 40)
    ours = marginops.select_minimal_margin(logits.to(device), k=40, softmax=True)
    assert set(ours.indices.tolist()) == set(chosen.tolist())
    every = marginops.minimal_margin_score(logits.to(device), softmax=True).cpu().numpy()
    np.testing.assert_allclose(every, margin, rtol=0, atol=1e-15)
    of_probabilities = marginops.minimal_margin_score(logits.softmax(1).to(device))
    np.testing.assert_allclose(of_probabilities.cpu().numpy(), margin, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("softmax", "chosen"), [(False, [0, 1]), (True, [1, 0])])
def test_logits_and_probabilities_rank_differently(device, softmax, chosen):
    logits = torch.tensor([[5.0, 4.0, -9.0], [5.0, 4.0, 3.9]], device=device)
    result = marginops.select_minimal_margin(logits, k=2, softmax=softmax)
    assert result.indices.tolist() == chosen
    expected = [0.3717, 0.4621] if softmax else [1.0, 1.0]
    torch.testing.assert_close(result.scores.cpu(), torch.tensor(expected), rtol=0, atol=1e-4)


@WHICH
@SOFTMAX
@given(logits=cases(), data=st.data())
def test_fused_selection_equals_score_and_selection(device, which, softmax, logits, data):
    k = data.draw(st.integers(0, len(logits)))
    with implementation(which):
        fused = marginops.select_minimal_margin(logits.to(device), k=k, softmax=softmax)
        scores = marginops.minimal_margin_score(logits.to(device), softmax=softmax)
    assert fused.indices.tolist() == brute_force.select_smallest(scores.tolist(), k)
    torch.testing.assert_close(fused.scores, scores[fused.indices], rtol=0, atol=0, equal_nan=True)


@SOFTMAX
@pytest.mark.parametrize("classes", [10, 300])
def test_thread_counts_agree(device, softmax, classes):
    logits = torch.randn(20_000, classes, device=device).mul(4).round()
    runs = set()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        chosen = marginops.select_minimal_margin(logits, k=5000, softmax=softmax)
        runs.add(chosen.indices.cpu().numpy().tobytes() + chosen.scores.cpu().numpy().tobytes())
    assert len(runs) == 1


@SOFTMAX
def test_gradient(device, softmax):
    logits = head(device)[0]
    assert gradcheck(lambda x: marginops.minimal_margin_score(x, softmax=softmax), (logits,))
    assert gradcheck(
        lambda x: marginops.select_minimal_margin(x, k=5, softmax=softmax).scores, (logits,)
    )


@pytest.mark.parametrize("scale", [1, 30])
@pytest.mark.parametrize("classes", [3, 300])
def test_gradient_of_probabilities_matches_autograd(device, dtype, classes, scale):
    logits = (scale * torch.randn(40, classes)).to(dtype).to(device)
    exact = logits.double().requires_grad_()
    probability_margin(exact).square().sum().backward()
    logits.requires_grad_()
    marginops.minimal_margin_score(logits, softmax=True).square().sum().backward()
    assert logits.grad.dtype == dtype
    rounding = max(4 * torch.finfo(dtype).eps, 1e-6 if dtype == torch.float32 else 0)
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, rtol=rounding, atol=max(rounding * 1e-4, 1e-15)
    )


def test_gradient_of_certain_samples_keeps_its_digits(device):
    """The gradient of the first class is p1 (1 - p1 + p2), and 1 - p1 is 1e-9 here."""
    logits = torch.tensor([[20.0, -0.7, -1.0, -3.0]], device=device, requires_grad=True)
    marginops.minimal_margin_score(logits, softmax=True).backward()
    powers = [math.exp(value) for value in logits[0].tolist()]
    first, second, *others = (power / math.fsum(powers) for power in powers)
    certain = first * (2 * second + math.fsum(others))
    assert logits.grad[0, 0].item() == pytest.approx(certain, rel=1e-5)


@SOFTMAX
def test_gradient_of_infinities_and_nan(device, softmax):
    logits = INFINITE.clone().to(device).requires_grad_()
    marginops.minimal_margin_score(logits, softmax=softmax).sum().backward()
    gradient = logits.grad.cpu()
    assert gradient[4, :2].isnan().all()
    certain, tied = gradient[:2], gradient[5]
    if softmax:
        assert not certain.any()
        assert tied.tolist() == [0.5, -0.5, 0]
        assert gradient[2:4, 0].isnan().all()
    else:
        assert certain.tolist() == [[1, 0, -1], [1, -1, 0]]
        assert tied.tolist() == [1, -1, 0]


@SOFTMAX
def test_gradient_reaches_only_chosen_samples(device, softmax):
    logits = head(device)[0]
    chosen = marginops.select_minimal_margin(logits, k=4, softmax=softmax)
    chosen.scores.sum().backward()
    touched = logits.grad.ne(0).any(1).nonzero().flatten()
    assert touched.tolist() == chosen.indices.sort().values.tolist()


def test_second_derivatives(device):
    logits = head(device)[0]
    assert gradgradcheck(lambda x: marginops.minimal_margin_score(x), (logits,))
    score = marginops.minimal_margin_score(logits, softmax=True).sum()
    (gradient,) = torch.autograd.grad(score, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.square().sum().backward()


def test_vectorized_jacobian(device):
    logits = head(device)[0].detach()
    function = torch.autograd.functional.jacobian
    batched = function(marginops.minimal_margin_score, logits, vectorize=True)
    assert torch.equal(batched, function(marginops.minimal_margin_score, logits))


@SOFTMAX
def test_opcheck(device, softmax):
    logits = head(device)[0]
    opcheck("minimal_margin_score", logits, None, None, False, softmax)
    for k in (0, 3, 12):
        opcheck("select_minimal_margin", logits, None, None, k, False, softmax)


@SOFTMAX
def test_compile_full_graph_with_dynamic_rows(device, softmax):
    def step(logits):
        score = marginops.minimal_margin_score(logits, softmax=softmax)
        return score, marginops.select_minimal_margin(logits, k=len(logits) // 3, softmax=softmax)

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (8, 15, 40):
        logits = head(device, rows=rows)[0]
        for part in (0, 1):
            actual, expected = compiled(logits)[part], step(logits)[part]
            if part:
                assert torch.equal(actual.indices, expected.indices)
                actual, expected = actual.scores, expected.scores
            assert torch.equal(actual, expected)
            gradients = (torch.autograd.grad(x.sum(), logits)[0] for x in (actual, expected))
            torch.testing.assert_close(*gradients)
    assert counter.frame_count == 1


@SOFTMAX
def test_autocast(device, softmax):
    layer = torch.nn.Linear(16, 10, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        logits = layer(torch.randn(64, 16, device=device))
        score = marginops.minimal_margin_score(logits, softmax=softmax)
        chosen = marginops.select_minimal_margin(logits, k=9, softmax=softmax)
        (score.sum() + chosen.scores.sum()).backward()
    assert logits.dtype == torch.bfloat16 and score.dtype == torch.float32
    assert layer.weight.grad.any()
    exact = marginops.minimal_margin_score(logits.float(), softmax=softmax)
    torch.testing.assert_close(score, exact)


@WHICH
@SOFTMAX
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(device, which, softmax, dtype):
    empty = torch.empty(0, 5, dtype=dtype, device=device, requires_grad=which == "native")
    with implementation(which):
        score = marginops.minimal_margin_score(empty, softmax=softmax)
        chosen = marginops.select_minimal_margin(empty, k=0, softmax=softmax)
    assert score.shape == chosen.scores.shape == chosen.indices.shape == (0,)
    if which == "native":
        (score.sum() + chosen.scores.sum()).backward()
        assert empty.grad.shape == (0, 5)


LOGITS, WEIGHT, BIAS = torch.randn(4, 3), torch.randn(3, 2), torch.randn(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS,), {"rival": "nearest"}, ValueError, 'weight: expected .* for rival="nearest", g'),
        ((LOGITS,), {"bias_in_norm": True}, ValueError, "weight: expected .* for bias_in_norm=Tr"),
        ((LOGITS,), {"bias": BIAS}, ValueError, r"weight: expected a tensor \[C, D\] for bias, go"),
        ((LOGITS, WEIGHT), {"softmax": True}, ValueError, "softmax: expected False with a weight"),
        ((LOGITS,), {"softmax": 1}, TypeError, "softmax: expected a bool, got int"),
        ((LOGITS,), {"rival": "third"}, ValueError, 'rival: expected "top2" or "nearest"'),
        ((LOGITS[:, :1],), {}, ValueError, "logits: expected at least 2 classes"),
        ((LOGITS[0],), {"softmax": True}, ValueError, r"logits: expected shape \[(..., )?N, C\]"),
        ((LOGITS.int(),), {}, TypeError, "logits: expected dtype .*, got torch.int32"),
    ],
)
def test_wrong_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        marginops.minimal_margin_score(*arguments, **options)
    with pytest.raises(error, match=message):
        marginops.select_minimal_margin(*arguments, k=2, **options)


def test_k_is_a_keyword():
    with pytest.raises(TypeError, match="k"):
        marginops.select_minimal_margin(LOGITS)
    with pytest.raises(TypeError, match="positional"):
        marginops.select_minimal_margin(LOGITS, WEIGHT, BIAS, 2)
    with pytest.raises(TypeError, match=r"bias: expected a tensor \[C\], got int"):
        marginops.select_minimal_margin(LOGITS, WEIGHT, 2, k=2)
    with pytest.raises(ValueError, match=r"k: expected 0 <= k <= 4 .* got 5"):
        marginops.select_minimal_margin(LOGITS, k=5)
