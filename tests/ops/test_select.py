"""select_smallest and selections fused with scores: exact order, gradients, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

import marginops
from helpers import brute_force
from helpers.ops import IMPLEMENTATIONS, OPS, head, implementation, opcheck
from helpers.strategies import anything, dtypes, margin_cases, score_cases


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.cpu().contiguous().view(torch.uint8).equal(
        b.cpu().contiguous().view(torch.uint8)
    )


@st.composite
def score_vectors(draw):
    values = draw(st.lists(anything, max_size=300))
    stride = draw(st.sampled_from([1, 1, 3]))
    scores = torch.tensor(values, dtype=torch.float64).to(draw(dtypes))
    strided = torch.full((len(values) * stride,), torch.nan, dtype=scores.dtype)[::stride]
    strided.copy_(scores)
    return strided, draw(st.integers(0, len(values)))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=score_vectors())
def test_selection_matches_brute_force(device, which, case):
    scores, k = case
    with implementation(which):
        chosen = marginops.select_smallest(scores.to(device), k)
    expected = brute_force.select_smallest(scores.tolist(), k)
    assert chosen.indices.tolist() == expected
    assert same_bits(chosen.scores, scores[torch.tensor(expected, dtype=torch.int64)])


def inputs_of_size(size: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    random = torch.randn(size, dtype=torch.float64)
    spread = torch.randn(size).double() * 10.0 ** torch.randint(-30, 30, (size,))
    some = torch.rand(size)
    special = torch.where(some < 0.2, torch.inf, torch.where(some > 0.8, torch.nan, random))
    special = torch.where((some > 0.4) & (some < 0.6), -torch.inf, special)
    return {
        "random": random.to(dtype),
        "spread": spread.to(dtype),
        "tied": torch.randint(0, 5, (size,)).to(dtype),
        "equal": torch.full((size,), 1.5, dtype=dtype),
        "ascending": torch.arange(size).to(dtype),
        "descending": -torch.arange(size).to(dtype),
        "special": special.to(dtype),
        "zeros of both signs": torch.where(some < 0.5, 0.0, -0.0).to(dtype),
    }


@pytest.mark.parametrize("size", [1, 2, 161, 1000, 4099, 70_001, 300_000])
def test_selection_is_the_beginning_of_numpys_stable_sort(device, dtype, size):
    for name, scores in inputs_of_size(size, dtype).items():
        order = np.argsort(scores.double().numpy(), kind="stable")
        for k in sorted({0, 1, min(10, size), 160 % size, size // 10, size // 2, size - 1, size}):
            chosen = marginops.select_smallest(scores.to(device), k)
            assert np.array_equal(chosen.indices.cpu().numpy(), order[:k]), (name, k)
            assert same_bits(chosen.scores, scores[torch.from_numpy(order[:k])]), (name, k)


def test_selection_is_the_beginning_of_torch_sort(device, dtype):
    scores = torch.randn(5000, device=device).to(dtype)
    values, indices = torch.sort(scores, stable=True)
    chosen = marginops.select_smallest(scores, 777)
    assert torch.equal(chosen.scores, values[:777])
    assert torch.equal(chosen.indices, indices[:777])


def test_nan_of_either_sign_comes_last(device):
    bits = torch.tensor([0x7FC00000, -0x00400000, 0x7F800000, 0x7F800001, -0x00800000, 0])
    scores = bits.to(torch.int32).view(torch.float32).to(device)
    assert marginops.select_smallest(scores, 6).indices.tolist() == [4, 5, 2, 0, 1, 3]


def test_runs_and_thread_counts_agree(device):
    scores = torch.randn(400_000, device=device).mul(100).round()
    runs = set()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.add(marginops.select_smallest(scores, 150_000).indices.cpu().numpy().tobytes())
    assert len(runs) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="2^32 scores need 50 GB; run where a GPU has them"
)
def test_more_scores_than_32_bit_indices():
    scores = torch.zeros(2**32 + 5, dtype=torch.float16, device="cuda:0")
    scores[-1] = -1
    assert marginops.select_smallest(scores, 3).indices.tolist() == [2**32 + 4, 0, 1]


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("rival", ["top2", "nearest"])
@given(case=score_cases(), data=st.data())
def test_fused_minimal_margin_equals_score_and_selection(device, which, rival, case, data):
    logits, weight, bias = (value if value is None else value.to(device) for value in case)
    k = data.draw(st.integers(0, len(logits)))
    options = {"rival": rival, "bias_in_norm": bias is not None}
    with implementation(which):
        fused = marginops.select_minimal_margin(logits, weight, bias, k=k, **options)
        scores = marginops.minimal_margin_score(logits, weight, bias, **options)
    expected = brute_force.select_smallest(scores.tolist(), k)
    assert fused.indices.tolist() == expected
    assert same_bits(fused.scores, scores[fused.indices])


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=margin_cases(), data=st.data())
def test_fused_classification_margin_equals_margin_and_selection(device, which, case, data):
    logits, target, log_norm = case
    logits, target = logits.to(device), target.to(device)
    k = data.draw(st.integers(0, len(logits)))
    with implementation(which):
        fused = marginops.select_classification_margin(logits, target, k, log_norm=log_norm)
        scores = marginops.classification_margin(logits, target, log_norm=log_norm)
    assert fused.indices.tolist() == brute_force.select_smallest(scores.tolist(), k)
    assert same_bits(fused.scores, scores[fused.indices])


def test_ignored_samples_are_chosen_last(device):
    logits = torch.tensor([[5.0, 0.0], [1.0, 0.0], [2.0, 0.0]], device=device)
    target = torch.tensor([0, 7, 0], device=device)
    chosen = marginops.select_classification_margin(logits, target, 3, ignore_index=7)
    assert chosen.indices.tolist() == [2, 0, 1]
    assert chosen.scores.tolist() == [2, 5, float("inf")]


@pytest.mark.parametrize("rival", ["top2", "nearest"])
@pytest.mark.parametrize("bias_in_norm", [False, True])
def test_gradient_of_chosen_scores(device, rival, bias_in_norm):
    def scores(logits, weight, bias):
        options = {"rival": rival, "bias_in_norm": bias_in_norm}
        return marginops.select_minimal_margin(logits, weight, bias, k=5, **options).scores

    assert gradcheck(scores, head(device))


def test_gradient_of_chosen_margins(device):
    logits, _, _ = head(device)
    target = torch.randint(6, (12,), device=device)
    log_norm = torch.tensor(0.4, dtype=torch.float64, device=device, requires_grad=True)

    def scores(logits, log_norm):
        return marginops.select_classification_margin(logits, target, 5, log_norm=log_norm).scores

    assert gradcheck(scores, (logits, log_norm))


def test_gradient_of_chosen_ignored_samples_is_zero(device):
    logits, _, _ = head(device)
    target = torch.full((12,), -100, device=device)
    log_norm = torch.zeros((), dtype=torch.float64, device=device, requires_grad=True)
    chosen = marginops.select_classification_margin(logits, target, 4, log_norm=log_norm)
    gradients = torch.autograd.grad(chosen.scores.sum(), (logits, log_norm))
    assert not any(gradient.any() for gradient in gradients)


def test_gradient_of_plain_selection(device):
    scores = torch.randn(30, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda scores: marginops.select_smallest(scores, 8).scores, (scores,))


def test_opcheck(device):
    logits, weight, bias = head(device)
    target = torch.randint(6, (12,), device=device)
    log_norm = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    for k in (0, 3, 12):
        opcheck("select_smallest", logits[:, 0], k)
        for nearest in (False, True):
            for norm_bias in (None, bias):
                opcheck("select_minimal_margin", logits, weight, norm_bias, k, nearest, False)
        for norm in (None, log_norm):
            opcheck("select_classification_margin", logits, target, norm, k, -100)


def test_compile_full_graph_with_dynamic_rows(device):
    def step(logits, weight, target):
        k = logits.shape[0] // 3
        minimal = marginops.select_minimal_margin(logits, weight, k=k)
        smallest = marginops.select_classification_margin(logits, target, k, log_norm=0.25)
        plain = marginops.select_smallest(logits[:, 0], k)
        return minimal, smallest, plain

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for rows in (8, 15, 40, 63):  # not 6, the number of classes
        logits, weight, _ = head(device, rows=rows)
        target = torch.randint(6, (rows,), device=device)
        for actual, expected in zip(
            compiled(logits, weight, target), step(logits, weight, target), strict=True
        ):
            assert torch.equal(actual.indices, expected.indices)
            assert torch.equal(actual.scores, expected.scores)
        actual = compiled(logits, weight, target)[0].scores.sum()
        expected = step(logits, weight, target)[0].scores.sum()
        torch.testing.assert_close(
            torch.autograd.grad(actual, (logits, weight)),
            torch.autograd.grad(expected, (logits, weight)),
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("select", ["minimal", "smallest"])
def test_fused_selections_check_the_arguments_of_their_scores(select):
    logits, weight, target = torch.randn(4, 3), torch.randn(3, 2), torch.tensor([0, 1, 2, 0])
    if select == "minimal":
        for wrong in ((logits[0], weight), (logits, weight.T), (logits, weight.double())):
            with pytest.raises((TypeError, ValueError), match=r"^(logits|weight): expected"):
                marginops.select_minimal_margin(*wrong, k=2)
    else:
        for wrong in ((logits[:, :1], target), (logits, target[:2]), (logits, target.int())):
            with pytest.raises((TypeError, ValueError), match=r"^(logits|target): expected"):
                marginops.select_classification_margin(*wrong, 2)


SCORES = torch.randn(5)


@pytest.mark.parametrize(
    ("scores", "k", "error", "message"),
    [
        ([1.0], 1, TypeError, r"scores: expected a tensor \[N\], got list"),
        (torch.randn(2, 2), 1, ValueError, r"scores: expected shape \[N\], got \[2, 2\]"),
        (torch.arange(3), 1, TypeError, "scores: expected dtype .*, got torch.int64"),
        (SCORES, -1, ValueError, r"k: expected 0 <= k <= 5 \(the number of scores\), got -1"),
        (SCORES, 6, ValueError, "k: expected 0 <= k <= 5 .*, got 6"),
        (SCORES, 1.5, TypeError, "k: expected an int, got float"),
        (SCORES, None, TypeError, "k: expected an int, got NoneType"),
        (SCORES, True, TypeError, "k: expected an int, got bool"),
    ],
)
def test_wrong_arguments(scores, k, error, message):
    with pytest.raises(error, match=message):
        marginops.select_smallest(scores, k)


@pytest.mark.parametrize("k", [-1, 5])
def test_wrong_k_of_fused_selections(k):
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=rf"k: expected 0 <= k <= 4 .* got {k}"):
        marginops.select_minimal_margin(logits, torch.randn(3, 2), k=k)
    with pytest.raises(ValueError, match=rf"k: expected 0 <= k <= 4 .* got {k}"):
        marginops.select_classification_margin(logits, target, k)
    with pytest.raises(RuntimeError, match="k: expected"):
        OPS.select_smallest(torch.randn(4), k)


def test_arguments_count_where_nothing_is_selected():
    logits, target = torch.randn(4, 3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="weight: expected 3 rows"):
        OPS.select_minimal_margin(logits, torch.ones(7, 2), None, 0, False, False)
    with pytest.raises(RuntimeError, match="target: expected shape"):
        OPS.select_classification_margin(logits, target, None, 0, -100)


def test_wrong_target_values_of_the_fused_selection():
    logits = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match=r"target: expected classes in \[0, 3\).*got 9"):
        marginops.select_classification_margin(logits, torch.tensor([0, 1, 2, 9]), 2)


def test_selection_from_no_scores(device, dtype):
    empty = torch.empty(0, 3, dtype=dtype, device=device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    weight = torch.randn(3, 2, device=device).to(dtype)
    assert marginops.select_smallest(empty[:, 0], 0).indices.shape == (0,)
    assert marginops.select_minimal_margin(empty, weight, k=0).scores.shape == (0,)
    assert marginops.select_classification_margin(empty, target, 0).scores.shape == (0,)
