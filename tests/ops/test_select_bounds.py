"""select_minimal_margin skips distances by bounds where this pays off. The result stays exact."""

import pytest
import torch

import marginops
from helpers.ops import head

ROWS, CLASSES, COLUMNS = 600, 30, 100  # more pairs of classes than rows, so no table is made


def logits_of_kind(kind: str) -> torch.Tensor:
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    if kind == "tied":
        return logits.round()
    if kind == "equal":
        return torch.zeros_like(logits)
    if kind == "few pairs":
        logits[:, 3], logits[:, 7] = 9, 9 - torch.rand(ROWS, dtype=torch.float64)
    if kind == "infinite":
        logits[torch.rand(ROWS, CLASSES) < 0.02] = torch.inf
        logits[torch.rand(ROWS, CLASSES) < 0.3] = -torch.inf
    if kind == "few finite":
        logits[20:, 4] = torch.inf
    if kind == "few without NaN":
        logits[20:, 4] = torch.nan
    if kind == "subnormal":
        logits = logits * 1e-41
    if kind == "huge":
        logits = logits * 1e36
    return logits


def weight_of_kind(kind: str) -> torch.Tensor:
    weight = torch.randn(CLASSES, COLUMNS, dtype=torch.float64)
    if kind == "opposite":  # the bound of such a pair is its distance
        return torch.cat((weight[: CLASSES // 2], -weight[: CLASSES // 2]))
    if kind == "on a line":
        return torch.linspace(-1, 1, CLASSES).double().unsqueeze(1) * weight[:1]
    if kind == "far from zero":
        return weight * 1e-3 + 1e3
    if kind == "equal":
        return weight[:1].repeat(CLASSES, 1)
    if kind == "spread":
        return weight * 10.0 ** torch.randint(-30, 18, (CLASSES, 1))
    if kind == "overflows":
        return weight * 1e30
    if kind == "underflows":
        return weight * 1e-30
    if kind == "infinite":
        weight[5, 3] = torch.inf
    if kind == "NaN":
        weight[5, 3] = torch.nan
    return weight


LOGITS = (
    "random",
    "tied",
    "equal",
    "few pairs",
    "infinite",
    "few finite",
    "few without NaN",
    "subnormal",
    "huge",
)
WEIGHTS = (
    "random",
    "opposite",
    "on a line",
    "far from zero",
    "equal",
    "spread",
    "overflows",
    "underflows",
    "infinite",
    "NaN",
)


@pytest.mark.parametrize("weight_kind", WEIGHTS)
@pytest.mark.parametrize("logits_kind", LOGITS)
def test_the_selection_is_that_of_all_scores(device, dtype, logits_kind, weight_kind):
    logits = logits_of_kind(logits_kind).to(device, dtype)
    weight = weight_of_kind(weight_kind).to(device, dtype)
    bias = torch.randn(CLASSES).to(device, dtype)
    for bias_in_norm in (False, True):
        scores = marginops.minimal_margin_score(logits, weight, bias, bias_in_norm=bias_in_norm)
        for k in (1, 7, 60, 142, 143):  # the last is too many for bounds
            chosen = marginops.select_minimal_margin(
                logits, weight, bias, k=k, bias_in_norm=bias_in_norm
            )
            expected = marginops.select_smallest(scores, k)
            assert torch.equal(chosen.indices, expected.indices), (k, bias_in_norm)
            torch.testing.assert_close(
                chosen.scores, expected.scores, rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("columns", [64, 65, 511, 2048])
def test_sizes_that_are_no_multiple_of_a_vector(device, dtype, columns):
    logits, weight, _ = head(device, dtype, 2000, 50, columns)
    expected = marginops.select_smallest(marginops.minimal_margin_score(logits, weight), 300)
    assert torch.equal(
        marginops.select_minimal_margin(logits, weight, k=300).indices, expected.indices
    )


def test_sums_of_many_columns_are_rounded():
    """In so long a float32 sum, the errors of radii and distances exceed a thousandth."""
    torch.manual_seed(0)
    classes, rows = 16, 100
    for _ in range(8):
        place = torch.rand(classes) * 2 - 1  # on a line, so the bounds are exact but for rounding
        weight = place.expand(300_000, classes).contiguous().t()  # its columns are summed in order
        first, last = int(place.argmax()), int(place.argmin())
        between = next(i for i in range(classes) if i not in (first, last))
        logits = torch.full((rows, classes), -1e3)
        logits[:, first] = 0
        pair = logits[:2].clone()
        pair[0, last] = pair[1, between] = -1
        one, other = 1 / marginops.minimal_margin_score(pair, weight)
        logits[0, last] = -1
        logits[1:, between] = -other / one * torch.linspace(1.00001, 1.01, rows - 1)
        scores = marginops.minimal_margin_score(logits, weight)
        for k in (1, 5):
            expected = marginops.select_smallest(scores, k)
            assert torch.equal(
                marginops.select_minimal_margin(logits, weight, k=k).indices, expected.indices
            )


def test_other_layouts(device, dtype):
    logits, weight, _ = head(device, dtype, ROWS, CLASSES, COLUMNS)
    expected = marginops.select_minimal_margin(logits, weight, k=40).indices
    transposed = logits.t().contiguous().t(), weight.t().contiguous().t()
    every_other = logits.repeat_interleave(2, 1)[:, ::2], weight.repeat_interleave(2, 0)[::2]
    for other_logits, other_weight in (transposed, every_other):
        chosen = marginops.select_minimal_margin(other_logits, other_weight, k=40)
        assert torch.equal(chosen.indices, expected)
