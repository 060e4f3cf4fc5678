"""The ops behind sample_statistics: shards of classes, opcheck, refusals, reproducibility."""

import math
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import marginops
from helpers import brute_force
from helpers.ops import IMPLEMENTATIONS, OPS, head, implementation, opcheck
from helpers.rounding import assert_same, assert_within, random_logits, rounding
from helpers.strategies import relayout, statistics_cases
from marginops._checks import result_dtype
from marginops.ops import row_sums


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@given(case=statistics_cases(), one_class=st.booleans())
def test_row_sums_match_brute_force(device, which, case, one_class):
    logits, target, _, _ = case
    known = (logits < math.inf).all(1)
    logits, target = logits[known], target[known]
    if one_class:
        logits = logits[:, -1:]
    with implementation(which):
        values, classes = row_sums.row_sums_op(logits.to(device), target.to(device), True)
    assert values.dtype == result_dtype(logits.dtype)
    assert values.shape == (len(logits), 6) and classes.dtype == torch.int64
    expected, leaders = brute_force.row_sums(logits, target)
    assert classes.tolist() == leaders
    with implementation(which):
        tops, same = row_sums.row_sums_op(logits.to(device), target.to(device), False)
    assert torch.equal(same, classes)
    assert_same(tops[:, :3], values[:, :3])
    assert not tops[:, 3:].any()
    if not len(logits):
        return
    expected = torch.tensor(expected, dtype=torch.float64)
    assert_same(values[:, :3].double().cpu(), expected[:, :3])
    relative = 0.0 if one_class else rounding(logits, target)[:, None]
    assert_within(values[:, 3:], expected[:, 3:], relative, torch.finfo(values.dtype).tiny * 1e6)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("classes", [1, 2, 70, 3000])
def test_shard_with_a_nan_or_without_any_finite_logit(device, dtype, which, classes):
    logits = torch.zeros(3, classes, dtype=dtype, device=device)
    logits[0, classes // 2] = math.nan
    logits[1] = -math.inf
    target = torch.tensor([0, 5000, -1], device=device)
    with implementation(which):
        values, leaders = row_sums.row_sums_op(logits, target, True)
    assert values[0, 0].isnan()
    expected = torch.tensor([-math.inf, -math.inf, 0, 0, 0, 0], dtype=values.dtype, device=device)
    assert torch.equal(values[1], expected)
    assert ((leaders >= -1) & (leaders < classes)).all()
    assert leaders[1:].tolist() == [[0, 1 if classes > 1 else -1]] * 2


def merge(parts):
    """A row's maximum, label logit, sums and leading class from those of its shards."""
    maximum = max(part[0] for part, _, _ in parts)
    leader = next(i for i, (part, _, _) in enumerate(parts) if part[0] == maximum)
    sums = [0.0, 0.0, 0.0]
    for i, (part, _, _) in enumerate(parts):
        step = part[0] - maximum
        if step == -math.inf:
            continue
        one, scale = (0.0 if i == leader else 1.0), math.exp(step)
        sums[0] += scale * (one + part[3])
        sums[1] += scale * (part[4] + step * (one + part[3]))
        sums[2] += scale**2 * (one + part[5])
    classes, start = parts[leader][1:]
    return [maximum, sum(part[2] for part, _, _ in parts), *sums], start + classes[0]


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("split", [[1, 9, 13], [23], [11, 1, 11], [1] * 23])
def test_shards_together_match_the_whole_row(device, dtype, which, split):
    logits, target = random_logits(device, dtype, rows=60, classes=23)
    logits = logits.round()  # ties between shards
    logits[:5, :1] = -math.inf
    logits[5:9, 1:11] = -math.inf
    logits[9, :] = -math.inf
    logits[9, 22] = 3
    parts, start = [], 0
    with implementation(which):
        whole, leaders = row_sums.row_sums_op(logits, target, True)
        for width in split:
            shard = logits[:, start : start + width]
            values, classes = row_sums.row_sums_op(shard, target - start, True)
            parts.append((values.tolist(), classes.tolist(), start))
            start += width
    relative = 2 * rounding(logits.cpu(), target.cpu())  # both sides round
    for row in range(60):
        merged, first = merge([(part[row], classes[row], at) for part, classes, at in parts])
        assert first == leaders[row, 0]
        assert_within(whole[row, [0, 2, 3, 4, 5]], merged, relative[row], 1e-30)


@pytest.mark.parametrize("split", [[1, 9, 13], [11, 1, 11], [1] * 23])
def test_gradient_of_shards_matches_the_whole_row(device, dtype, split):
    """Labels and rivals outside a shard belong to another one."""
    logits, target = random_logits(device, dtype, rows=60, classes=23)
    target[::9] = -100
    _, rival, _, _, confidence, entropy, *_, maximum, log_sum, _, _ = OPS.sample_statistics(
        logits, target, None, None, -100, False
    )
    fields = confidence, entropy, maximum, log_sum
    grads = [torch.randn_like(confidence) for _ in range(4)]
    for some in (grads, [grads[0], None, None, None], [None, *grads[1:]]):
        whole = OPS.sample_statistics_gradient(
            logits, target, rival, *fields, None, *some, None, None, -100
        )
        parts, start = [], 0
        for width in split:
            here = torch.where(target == -100, -100, target - start), rival - start
            shard = logits[:, start : start + width]
            parts.append(
                OPS.sample_statistics_gradient(shard, *here, *fields, None, *some, None, None, -100)
            )
            start += width
        epsilon = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=epsilon, atol=epsilon)


def test_opcheck(device):
    logits, _, _ = head(device)
    target = torch.randint(6, (12,), device=device)
    target[0] = -1
    norm = torch.rand(12, dtype=torch.float64, device=device)
    log_norm = torch.tensor(0.5, dtype=torch.float64, device=device, requires_grad=True)
    opcheck("sample_statistics", logits, target, None, None, -1, True)
    opcheck("sample_statistics", logits, target, norm, log_norm, -1, False)
    exact = logits.detach()
    _, rival, _, _, *fields = OPS.sample_statistics(exact, target, None, None, -1, True)
    saved = rival, fields[0], fields[1], fields[6], fields[7]
    grad = torch.randn(12, dtype=torch.float64, device=device)
    spread = grad[:1].expand(12)
    for scale, grads in (
        (None, (grad, grad, spread, spread, None, None)),
        (log_norm.detach(), (spread, None, None, None, grad[0], fields[9])),
    ):
        opcheck("sample_statistics_gradient", exact, target, *saved, scale, *grads, -1)
    opcheck("row_sums", exact, target, True)
    opcheck("row_sums", exact[:, :1], target, False)
    opcheck("row_sums", exact[:0].half(), target[:0], True)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_no_rows(device, dtype, which):
    logits = torch.empty(0, 5, dtype=dtype, device=device)
    target = torch.empty(0, dtype=torch.int64, device=device)
    with implementation(which):
        result = marginops.sample_statistics(logits, target, input=logits)
        values, classes = row_sums.row_sums_op(logits, target, True)
    wide = result_dtype(dtype)
    others = {"rival": torch.int64, "correct": torch.bool, "counted": torch.bool}
    dtypes = [others.get(name, wide) for name in result._fields]
    assert [field.dtype for field in result] == dtypes
    assert all(field.shape == (0,) for field in result)
    assert values.shape == (0, 6) and classes.shape == (0, 2)


@pytest.mark.parametrize(("rows", "classes"), [(5000, 10), (3000, 100), (64, 5000)])
def test_every_run_gives_the_same_bits(device, dtype, rows, classes):
    logits, target = random_logits(device, dtype, rows, classes)
    logits.requires_grad_()
    runs = set()
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        result = marginops.sample_statistics(logits, target, input=logits)
        total = result.loss.sum() + (result.entropy * result.confidence - result.margin).sum()
        (gradient,) = torch.autograd.grad(total, logits)
        shard = row_sums.row_sums_op(logits.detach(), target, True)
        tensors = [*result, gradient.float(), *shard]
        runs.add(tuple(value.detach().cpu().numpy().tobytes() for value in tensors))
    assert len(runs) == 1


@pytest.mark.skipif("MARGINOPS_DISABLE_JIT" in os.environ, reason="[N, C] would be copied")
def test_rows_beyond_32_bit_offsets(device):
    row = torch.randn(1, 32768, device=device)
    logits = row.expand(70_000, -1)
    target = torch.zeros(70_000, dtype=torch.int64, device=device)
    result = marginops.sample_statistics(logits, target)
    first = marginops.sample_statistics(row, target[:1])
    assert result.loss.unique().tolist() == first.loss.tolist()
    assert result.entropy.unique().tolist() == first.entropy.tolist()


LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], TARGET), {}, TypeError, r"logits: expected a tensor \[..., N, C\], got list"),
        ((LOGITS[0], TARGET), {}, ValueError, r"logits: expected shape \[..., N, C\], got \[3\]"),
        ((LOGITS[:, :1], TARGET), {}, ValueError, r"logits: expected at least 2 .* got \[4, 1\]"),
        ((LOGITS.int(), TARGET), {}, TypeError, "logits: expected dtype .*, got torch.int32"),
        ((LOGITS.to_sparse(), TARGET), {}, TypeError, r"logits: expected a dense .*sparse_coo"),
        ((LOGITS, [0, 1, 2, 0]), {}, TypeError, r"target: expected a tensor \[N\], got list"),
        ((LOGITS, TARGET.int()), {}, TypeError, "target: expected dtype torch.int64 .*int32"),
        ((LOGITS, TARGET[:1]), {}, ValueError, r"target: expected shape \[4\].*got \[1\]"),
        ((LOGITS, TARGET.view(2, 2)), {}, ValueError, r"target: expected shape.*got \[2, 2\]"),
        ((LOGITS, TARGET.to("meta")), {}, ValueError, "target: expected device cpu .* got meta"),
        ((LOGITS, TARGET), {"input": [1.0]}, TypeError, r"input: .* tensor \[N, D\], got list"),
        ((LOGITS, TARGET), {"input": LOGITS[0]}, ValueError, r"input: .* \[N, D\], got \[3\]"),
        ((LOGITS, TARGET), {"input": LOGITS[1:]}, ValueError, r"input: expected 4 .*got .*\[3, 3"),
        ((LOGITS, TARGET), {"input": LOGITS.int()}, TypeError, "input: expected dtype .*int32"),
        ((LOGITS, TARGET), {"input": LOGITS.to("meta")}, ValueError, "input: .* cpu .* got meta"),
        ((LOGITS, TARGET), {"input": LOGITS.to_sparse()}, TypeError, "input: expected a dense"),
        ((LOGITS, TARGET), {"log_norm": "1"}, TypeError, "log_norm: .* 0-d tensor, got str"),
        ((LOGITS, TARGET), {"log_norm": True}, TypeError, "log_norm: .* 0-d tensor, got bool"),
        ((LOGITS, TARGET), {"log_norm": torch.ones(2)}, ValueError, r"log_norm: .*got \[2\]"),
        ((LOGITS, TARGET), {"log_norm": torch.tensor(1)}, TypeError, "log_norm: .*torch.int64"),
        ((LOGITS, TARGET), {"ignore_index": None}, TypeError, "ignore_index: .* int, got NoneType"),
        ((LOGITS, TARGET), {"ignore_index": True}, TypeError, "ignore_index: .* int, got bool"),
    ],
)
@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_wrong_arguments(which, arguments, options, error, message):
    with implementation(which), pytest.raises(error, match=message):
        marginops.sample_statistics(*arguments, **options)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize(("step", "wrong"), [(1, 3), (-1, -1), (10**12, 10**12)])
def test_wrong_target_values(which, step, wrong):
    message = rf"target: expected classes in \[0, 3\) or ignore_index -100, got {wrong}"
    with implementation(which), pytest.raises(RuntimeError, match=message):
        marginops.sample_statistics(LOGITS, TARGET + step)


NATIVE = pytest.mark.skipif("MARGINOPS_DISABLE_JIT" in os.environ, reason="checked by the kernels")


@NATIVE
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LOGITS[0], TARGET, None, None, -100, True), "logits: expected"),
        ((LOGITS[:, :1], TARGET, None, None, -100, True), "logits: expected 2 <= C"),
        ((LOGITS.int(), TARGET, None, None, -100, True), "logits: expected dtype"),
        ((LOGITS, TARGET[:2], None, None, -100, True), "target: expected shape"),
        ((LOGITS, TARGET[:1], None, None, -100, True), "target: expected shape"),
        ((LOGITS, TARGET.view(2, 2), None, None, -100, True), "target: expected shape"),
        ((LOGITS, TARGET.int(), None, None, -100, True), "target: expected dtype"),
        ((LOGITS, TARGET, torch.ones(3), None, -100, True), "input_norm: expected"),
        ((LOGITS, TARGET, torch.ones(4, 1), None, -100, True), "input_norm: expected"),
        ((LOGITS, TARGET, torch.ones(4).double(), None, -100, True), "input_norm: expected"),
        ((LOGITS, TARGET, None, torch.ones(2), -100, True), "log_norm: expected"),
        ((LOGITS, TARGET, None, torch.ones(()).double(), -100, True), "log_norm: expected"),
    ],
)
def test_wrong_direct_calls(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.sample_statistics(*arguments)


@NATIVE
@pytest.mark.parametrize(
    "arguments",
    [(LOGITS[0], TARGET), (LOGITS[:, :0], TARGET), (LOGITS.long(), TARGET), (LOGITS, TARGET[:2])],
)
def test_wrong_direct_calls_for_a_shard(arguments):
    with pytest.raises(RuntimeError, match="expected"):
        OPS.row_sums(*arguments, True)


@NATIVE
@pytest.mark.parametrize("position", [*range(14)])
def test_wrong_direct_calls_of_the_gradient(position):
    """Each argument in turn is too long, too short, of another dtype, or of more dimensions."""
    _, rival, _, _, confidence, entropy, *_, maximum, log_sum, _, _ = OPS.sample_statistics(
        LOGITS, TARGET, None, None, -100, False
    )
    grad = torch.ones(4)
    right = [LOGITS, TARGET, rival, confidence, entropy, maximum, log_sum, torch.ones(())]
    right += [grad] * 4 + [torch.ones(())] * 2
    OPS.sample_statistics_gradient(*right, -100)
    value = right[position]
    for wrong in (
        value[:2] if value.dim() else torch.ones(2),
        torch.cat((value, value)) if value.dim() else torch.ones(2, 1),
        value.short(),
        value.unsqueeze(-1) if value.dim() else torch.ones(()).double(),
    ):
        arguments = [*right[:position], wrong, *right[position + 1 :], -100]
        with pytest.raises(RuntimeError, match="expected"):
            OPS.sample_statistics_gradient(*arguments)


def test_layout_of_a_direct_call(device):
    """The kernels take the strides of every argument."""
    logits, target = random_logits(device, torch.float32)
    norm = torch.rand(200, 2, device=device)[:, 1]
    expected = OPS.sample_statistics(logits, target, norm.contiguous(), None, -100, True)
    spread = relayout(logits.cpu(), "strided").to(device)
    actual = OPS.sample_statistics(spread, target, norm, None, -100, True)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def export(module, inputs, *, strict):
    return torch.export.export(module, inputs, strict=strict).module()


@pytest.mark.parametrize(
    "trace", [partial(export, strict=False), partial(export, strict=True), torch.jit.trace]
)
def test_a_graph_that_is_traced_without_a_gradient_has_one_later(trace, device):
    class Loss(torch.nn.Module):
        def forward(self, logits, target):
            return marginops.sample_statistics(logits, target).loss.mean()

    logits, target = torch.randn(6, 4, device=device), torch.arange(6, device=device) % 4
    traced = trace(Loss(), (logits, target))
    logits = logits.clone().requires_grad_()
    (actual,) = torch.autograd.grad(traced(logits, target), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    torch.testing.assert_close(actual, expected)
