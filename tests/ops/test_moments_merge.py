"""Merging of class_moments, other ignored targets, and every wrong argument."""

import math
import os

import pytest
import torch

from helpers.ops import IMPLEMENTATIONS, OPS, implementation
from helpers.rounding import assert_same
from marginops.ops.moments import ClassMoments, class_moments


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("normalize", [False, True])
def test_merged_parts_are_the_whole(device, dtype, normalize, parts):
    input, target = torch.randn(700, 11).to(device, dtype) + 2, torch.randint(5, (700,))
    target[:400] = torch.randint(3, (400,))  # some parts lack some classes
    target[::9] = -100
    target = target.to(device)
    whole = class_moments(input, target, 6, normalize=normalize)
    merged = class_moments(input[:0], target[:0], 6, normalize=normalize)
    for rows, labels in zip(input.chunk(parts), target.chunk(parts), strict=True):
        merged = merged.merge(class_moments(rows, labels, 6, normalize=normalize))
    assert torch.equal(merged.count, whole.count)
    assert merged.mean.dtype == whole.mean.dtype and merged.radius.dtype == whole.radius.dtype
    epsilon = torch.finfo(whole.mean.dtype).eps
    for one, other in ((merged.mean, whole.mean), (merged.radius, whole.radius)):
        torch.testing.assert_close(one, other, rtol=8 * epsilon, atol=8 * epsilon, equal_nan=True)
    assert merged.radius[5].isnan() and merged.mean[5].isnan().all()


def test_merge_of_equal_rows_of_empty_classes_and_of_other_dtypes(device):
    row, target = torch.randn(1, 7, device=device), torch.tensor([0], device=device)
    one, two = (class_moments(row.expand(n, -1), target.expand(n), 3) for n in (5, 8))
    merged = one.merge(two)
    assert merged.radius[0] == 0 and torch.equal(merged.mean[:1], row)
    assert merged.mean[1:].isnan().all() and merged.radius[1:].isnan().all()
    wide = class_moments(row.double(), target, 3)
    assert one.merge(wide).mean.dtype == wide.merge(one).radius.dtype == torch.float64
    no_columns = class_moments(row[:, :0], target, 2).merge(class_moments(row[:, :0], target, 2))
    assert_same(no_columns.radius, torch.tensor([0.0, math.nan], device=device))
    with pytest.raises(
        ValueError, match=r"other: expected moments of shape \[3, 7\], got \[2, 0\]"
    ):
        one.merge(no_columns)
    with pytest.raises(ValueError, match=r"other: expected device .* as these moments, got meta"):
        one.merge(ClassMoments(*(value.to("meta") for value in one)))


def test_merge_keeps_a_nan(device):
    input, target = torch.zeros(4, 3, device=device), torch.tensor([0, 0, 1, 1], device=device)
    input[0, 1] = math.nan
    bad, good = class_moments(input, target, 2), class_moments(torch.ones_like(input), target, 2)
    for merged in (bad.merge(good), good.merge(bad)):
        assert merged.mean.isnan().tolist() == [[False, True, False], [False] * 3]
        assert merged.radius.isnan().tolist() == [True, False]


def test_merge_keeps_an_infinite_radius_beside_an_empty_class(device):
    input = torch.tensor([[3e38, 3e38], [-3e38, -3e38]], device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    wide, empty = (class_moments(rows, target[: len(rows)], 1) for rows in (input, input[:0]))
    assert wide.radius == math.inf  # in float32
    for merged in (wide.merge(empty), empty.merge(wide)):
        assert_same(merged.radius, wide.radius)
        assert_same(merged.mean, wide.mean)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_another_ignore_index_and_only_ignored_samples(device, which):
    input, target = torch.randn(6, 3, device=device), torch.tensor([0, 1, 7, 0, 1, 7])
    target = target.to(device)
    with implementation(which):
        moments = class_moments(input, target, 2, ignore_index=7)
        inner = class_moments(input, target % 3, 3, ignore_index=1)
        nothing = class_moments(input, torch.full_like(target, -100), 2)
    assert moments.count.tolist() == [2, 2]
    assert inner.count.tolist() == [2, 0, 0] and inner.radius[1:].isnan().all()
    assert nothing.count.tolist() == [0, 0]
    assert nothing.mean.isnan().all() and nothing.radius.isnan().all()


INPUT, TARGET = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], TARGET, 3), TypeError, r"input: expected a tensor \[N, D\], got list"),
        ((INPUT[0], TARGET, 3), ValueError, r"input: expected shape \[N, D\], got \[3\]"),
        ((INPUT.int(), TARGET, 3), TypeError, "input: expected dtype .*, got torch.int32"),
        ((INPUT.to_sparse(), TARGET, 3), TypeError, r"input: expected a dense .*sparse_coo"),
        ((INPUT, TARGET.int(), 3), TypeError, "target: expected dtype torch.int64 .*int32"),
        ((INPUT, TARGET[:1], 3), ValueError, r"target: expected shape \[4\] for input .*got \[1\]"),
        ((INPUT, TARGET.to("meta"), 3), ValueError, "target: .* cpu as input, got meta"),
        ((INPUT, TARGET, 0), ValueError, "num_classes: expected at least 1, got 0"),
        ((INPUT, TARGET, 3.0), TypeError, "num_classes: expected an int, got float"),
        ((INPUT, TARGET, True), TypeError, "num_classes: expected an int, got bool"),
    ],
)
@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_wrong_arguments(which, arguments, error, message):
    with implementation(which), pytest.raises(error, match=message):
        class_moments(*arguments)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize(("step", "wrong"), [(1, 3), (-1, -1), (10**12, 10**12)])
def test_wrong_target_values(which, step, wrong):
    message = rf"target: expected classes in \[0, 3\) or ignore_index -100, got {wrong}"
    with implementation(which), pytest.raises(RuntimeError, match=message):
        class_moments(INPUT, TARGET + step, 3)


@pytest.mark.skipif("MARGINOPS_DISABLE_JIT" in os.environ, reason="checked by the kernels")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INPUT[0], TARGET, 3), "input: expected shape"),
        ((INPUT.int(), TARGET, 3), "input: expected dtype"),
        ((INPUT, TARGET[:2], 3), "target: expected shape"),
        ((INPUT, TARGET.view(2, 2), 3), "target: expected shape"),
        ((INPUT, TARGET.int(), 3), "target: expected dtype"),
        ((INPUT, TARGET, 0), "num_classes: expected at least 1"),
    ],
)
def test_wrong_direct_calls(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.class_moments(*arguments, False, -100)
