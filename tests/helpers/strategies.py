"""Hypothesis strategies for logits, weights and scores: ties, special values, layouts."""

import math

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(DTYPES)

# Few distinct values make ties. Special values are mixed in.
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
    """The dtypes that a weight may have for logits of this dtype."""
    return [dtype] if dtype in (torch.float32, torch.float64) else [dtype, torch.float32]


@st.composite
def margin_cases(draw):
    rows, classes = draw(st.integers(0, 20)), draw(st.sampled_from([2, 3, 10, 17, 49, 70]))
    logits = draw(tensors(rows, classes, draw(dtypes), anything))
    labels = st.integers(0, classes - 1) | st.just(-100)
    target = torch.tensor(draw(st.lists(labels, min_size=rows, max_size=rows)), dtype=torch.int64)
    return logits, target, draw(st.none() | st.floats(-80, 80, width=32))


@st.composite
def score_cases(draw, elements=anything):
    rows, classes = draw(st.integers(0, 20)), draw(st.sampled_from([2, 3, 5, 18, 49, 70]))
    columns = draw(st.sampled_from([0, 1, 3, 16, 21, 70]))
    logits = draw(tensors(rows, classes, draw(dtypes), elements))
    weight_dtype = draw(st.sampled_from(matching_weight_dtypes(logits.dtype)))
    # A seed gives the weights: thousands of drawn numbers would only slow the search down.
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dense = torch.randint(-2, 3, (classes, columns), generator=random) * draw(
        st.sampled_from([1.0, 1e-3, 7.25])
    )
    weight = relayout(dense.to(weight_dtype), draw(st.sampled_from(LAYOUTS)))
    bias = torch.randn(classes, generator=random).to(weight_dtype)
    return logits, weight, bias if draw(st.booleans()) else None


@st.composite
def statistics_cases(draw):
    """Logits, target, input or None, log_norm or None."""
    rows = draw(st.integers(0, 12))
    classes = draw(st.sampled_from([2, 3, 10, 17, 48, 49, 65, 70, 129]))
    # A seed gives most logits: thousands of drawn numbers would only slow the search down.
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size, step = draw(st.sampled_from([(1.0, 0.0), (10.0, 0.0), (1e4, 0.0), (2.0, 1.0)]))
    dense = torch.randn(rows, classes, generator=random, dtype=torch.float64) * size
    dense = (dense / step).round() * step if step else dense
    if rows:
        row, column = st.integers(0, rows - 1), st.integers(0, classes - 1)
        for place in draw(st.lists(st.tuples(row, column, _special), max_size=6)):
            dense[place[0], place[1]] = place[2]
        dense[draw(st.lists(row, max_size=2)), draw(column) :] = -math.inf
    logits = relayout(dense.to(draw(dtypes)), draw(st.sampled_from(LAYOUTS)))
    labels = st.integers(0, classes - 1) | st.just(-100)
    target = torch.tensor(draw(st.lists(labels, min_size=rows, max_size=rows)), dtype=torch.int64)
    input = None
    if draw(st.booleans()):
        columns = draw(st.sampled_from([0, 1, 3, 33]))
        features = torch.randn(rows, columns, generator=random).to(draw(dtypes))
        input = relayout(features, draw(st.sampled_from(LAYOUTS)))
    return logits, target, input, draw(st.none() | st.floats(-80, 80, width=32))


@st.composite
def class_sum_cases(draw):
    """Sorted keys with repetitions, a coefficient for each, rows, and the number of classes."""
    rows, classes = draw(st.integers(0, 9)), draw(st.integers(0, 7))
    columns = draw(st.sampled_from([0, 1, 3, 16, 21, 70]))
    count = draw(st.integers(0, 40)) if rows * classes else 0
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    key = torch.randint(max(rows * classes, 1), (count,), generator=random).sort().values
    dense = torch.randn(rows, columns, generator=random).to(draw(dtypes))
    coefficient = torch.randn(count, generator=random, dtype=torch.float64)
    if dense.dtype != torch.float64:
        coefficient = coefficient.float()
    return key, coefficient, relayout(dense, draw(st.sampled_from(LAYOUTS))), classes


def small_integers(*shape: int, largest: int = 2, random: torch.Generator | None = None):
    """Integers whose products, and sums of up to 16 of these, are exact in every dtype."""
    return torch.randint(-largest, largest + 1, shape, generator=random).double()


@st.composite
def linear_cases(draw):
    """A head whose logits are exact: input, weight, bias or None, target, and rows of a chunk."""
    rows, classes = draw(st.integers(0, 14)), draw(st.sampled_from([2, 3, 5, 18, 49, 70]))
    columns, dtype = draw(st.sampled_from([0, 1, 3, 8, 16])), draw(dtypes)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    input = small_integers(rows, columns, largest=3, random=random)
    if rows and columns:
        row, column = st.integers(0, rows - 1), st.integers(0, columns - 1)
        special = st.sampled_from([math.nan, math.inf, -math.inf])
        for place in draw(st.lists(st.tuples(row, column, special), max_size=2)):
            input[place[0], place[1]] = place[2]
    weight = small_integers(classes, columns, random=random).to(dtype)
    bias = small_integers(classes, largest=3, random=random).to(dtype)
    labels = st.integers(0, classes - 1) | st.just(-100)
    target = torch.tensor(draw(st.lists(labels, min_size=rows, max_size=rows)), dtype=torch.int64)
    return (
        relayout(input.to(dtype), draw(st.sampled_from(LAYOUTS))),
        relayout(weight, draw(st.sampled_from(LAYOUTS))),
        bias if draw(st.booleans()) else None,
        target,
        draw(st.integers(1, rows + 1)),
    )
