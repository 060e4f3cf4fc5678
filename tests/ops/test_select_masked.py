"""select_smallest with a mask and skipped scores, and the complement of a selection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import marginops
from helpers import brute_force
from helpers.ops import IMPLEMENTATIONS, implementation
from helpers.strategies import anything, dtypes


@st.composite
def masked_scores(draw):
    values = draw(st.lists(anything, max_size=60))
    mask = draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    skip = draw(st.integers(0, sum(mask)))
    scores = torch.tensor(values, dtype=torch.float64).to(draw(dtypes))
    return (
        scores,
        torch.tensor(mask, dtype=torch.bool),
        draw(st.integers(0, sum(mask) - skip)),
        skip,
    )


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=masked_scores())
def test_a_masked_selection_is_that_of_the_allowed_rows(device, which, case) -> None:
    scores, mask, k, skip = case
    with implementation(which):
        chosen = marginops.select_smallest(scores.to(device), k, mask=mask.to(device), skip=skip)
    order = brute_force.select_smallest(scores.tolist(), len(scores))
    allowed = [index for index in order if mask[index]]
    assert chosen.indices.tolist() == allowed[skip : skip + k]
    expected = scores[chosen.indices.cpu()]
    torch.testing.assert_close(chosen.scores.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    rest = [index for index in range(len(scores)) if index not in chosen.indices.tolist()]
    assert chosen.complement(len(scores)).tolist() == rest


@pytest.mark.parametrize("skip", [0, 3])
def test_skip_needs_no_mask(device, skip) -> None:
    scores = torch.tensor([torch.nan, 2.0, -1.0, 2.0, -0.0, 0.0, torch.inf], device=device)
    chosen = marginops.select_smallest(scores, 4, skip=skip)
    assert chosen.indices.tolist() == [2, 4, 5, 1, 3, 6, 0][skip : skip + 4]


def test_a_masked_nan_never_takes_the_place_of_an_allowed_one(device) -> None:
    scores = torch.full((6,), torch.nan, device=device)
    mask = torch.tensor([False, True, False, True, True, False], device=device)
    assert marginops.select_smallest(scores, 3, mask=mask).indices.tolist() == [1, 3, 4]


def test_a_masked_selection_is_differentiable() -> None:
    mask = torch.tensor([True, False, True, True, True])
    scores = torch.tensor([3.0, 0.0, 1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    gradcheck(lambda x: marginops.select_smallest(x, 2, mask=mask, skip=1).scores, scores)
    marginops.select_smallest(scores, 2, mask=mask, skip=1).scores.sum().backward()
    assert scores.grad.tolist() == [1, 0, 0, 1, 0]


def test_the_complement_is_compiled_without_a_break() -> None:
    def rest(scores: torch.Tensor) -> torch.Tensor:
        return marginops.select_smallest(scores, 3, skip=1).complement(8)

    scores = torch.randn(8)
    compiled = torch.compile(rest, backend="eager", fullgraph=True)
    assert torch.equal(compiled(scores), rest(scores))
    fused = marginops.select_minimal_margin(torch.randn(8, 3), k=8)
    assert fused.complement(8).shape == (0,) and fused.complement(8).dtype == torch.int64


SCORES = torch.arange(5.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"mask": [True] * 5},
            TypeError,
            r"mask: expected a bool tensor .* \[5\] as scores, got l",
        ),
        ({"mask": torch.ones(5)}, TypeError, r"mask: .* got torch\.float32; pass a comparison"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask: .*\[5\] .*, got \[4\]"),
        ({"mask": SCORES > 3}, ValueError, r"k: expected 0 <= k <= 1 \(the number of scores that"),
        (
            {"mask": SCORES > 1, "skip": 2},
            ValueError,
            "k: .* <= 1 .* mask allows after skip.* got 2",
        ),
        ({"mask": SCORES > 3, "skip": 2}, ValueError, "skip: expected at most 1 .* got 2"),
        (
            {"skip": 4},
            ValueError,
            r"k: expected 0 <= k <= 1 \(the number of scores after skip\), got 2",
        ),
        ({"skip": 6}, ValueError, "skip: expected at most 5 .*, got 6"),
        ({"skip": -1}, ValueError, "skip: expected at least 0, got -1"),
        ({"skip": 0.2}, TypeError, "skip: expected an int, got float"),
        ({"skip": False}, TypeError, "skip: expected an int, got bool"),
    ],
)
def test_errors_name_what_is_wrong(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        marginops.select_smallest(SCORES, 2, **arguments)


def test_a_wrong_count_of_a_complement_is_named() -> None:
    chosen = marginops.select_smallest(SCORES, 2, skip=3)
    with pytest.raises(ValueError, match=r"count: expected at least 2 .*, got 1"):
        chosen.complement(1)
    with pytest.raises(TypeError, match="count: expected an int, got Tensor"):
        chosen.complement(SCORES)
    with pytest.raises(RuntimeError, match="out of bounds"):
        chosen.complement(4)
