"""Hypothesis strategies for logits, weights and scores with everything that can go wrong."""

import math

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)

# Few distinct values make ties; a few special ones go in between.
_special = st.sampled_from([math.inf, -math.inf, math.nan, -math.nan, 0.0, -0.0, 6e-8, 6e4])
_tied = st.integers(-3, 3).map(float)
_plain = st.floats(-100, 100, width=16)
finite = st.one_of(_tied, _plain)
anything = st.one_of(_tied, _plain, _special)


def tensors(rows: int, columns: int, dtype: torch.dtype, elements: st.SearchStrategy):
    """[rows, columns] in one of several layouts with the same values."""

    def build(values: list[float], layout: str) -> torch.Tensor:
        dense = torch.tensor(values, dtype=torch.float64).reshape(rows, columns).to(dtype)
        return relayout(dense, layout)

    return st.builds(
        build,
        st.lists(elements, min_size=rows * columns, max_size=rows * columns),
        st.sampled_from(LAYOUTS),
    )


LAYOUTS = ["contiguous", "transposed", "padded", "strided", "offset"]


def relayout(dense: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    rows, columns = dense.shape
    if layout == "transposed":
        return dense.T.contiguous().T
    if layout == "padded":  # rows start at odd addresses
        padded = dense.new_full((rows, columns + 3), math.nan)
        padded[:, 1 : columns + 1] = dense
        return padded[:, 1 : columns + 1]
    if layout == "strided":
        wide = dense.new_full((rows, 2 * columns), math.nan)
        wide[:, ::2] = dense
        return wide[:, ::2]
    if layout == "offset":
        flat = dense.new_full((rows * columns + 1,), math.nan)
        flat[1:] = dense.reshape(-1)
        return flat[1:].reshape(rows, columns)
    return dense.contiguous()


def matching_weight_dtypes(dtype: torch.dtype) -> list[torch.dtype]:
    """What weight may be beside logits of this dtype."""
    return [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]


@st.composite
def margin_cases(draw):
    rows, classes = draw(st.integers(0, 20)), draw(st.sampled_from([2, 3, 10, 17, 49, 70]))
    logits = draw(tensors(rows, classes, draw(dtypes), anything))
    labels = st.integers(0, classes - 1) | st.just(-100)
    target = torch.tensor(draw(st.lists(labels, min_size=rows, max_size=rows)), dtype=torch.int64)
    return logits, target, draw(st.none() | st.floats(-80, 80))


@st.composite
def score_cases(draw, elements=anything):
    rows, classes = draw(st.integers(0, 20)), draw(st.sampled_from([2, 3, 5, 18, 49, 70]))
    columns = draw(st.sampled_from([0, 1, 3, 16, 21, 70]))
    logits = draw(tensors(rows, classes, draw(dtypes), elements))
    weight_dtype = draw(st.sampled_from(matching_weight_dtypes(logits.dtype)))
    # Weights from a seed: thousands of drawn numbers would only slow the search down.
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dense = torch.randint(-2, 3, (classes, columns), generator=random) * draw(
        st.sampled_from([1.0, 1e-3, 7.25])
    )
    weight = relayout(dense.to(weight_dtype), draw(st.sampled_from(LAYOUTS)))
    bias = torch.randn(classes, generator=random).to(weight_dtype)
    return logits, weight, bias if draw(st.booleans()) else None
