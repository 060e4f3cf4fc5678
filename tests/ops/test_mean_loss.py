"""The mean loss of sample_statistics: a result of the op, right whatever happens to the losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import marginops
from helpers.ops import IMPLEMENTATIONS, OPS, implementation
from helpers.rounding import random_logits
from marginops.ops.statistics import sample_statistics_op
from marginops.ops.statistics_gradient import sample_statistics_gradient_op


@pytest.fixture
def batch(device):
    logits, target = random_logits(device, torch.float64, rows=40)
    target[::7] = -100
    return logits.requires_grad_(), target


def gradient(value, logits):
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 300, 5000])
def test_the_op_returns_mean_and_count_if_asked(device, dtype, which, rows):
    logits, target = random_logits(device, dtype, rows)
    target[1::3] = -100
    with implementation(which):
        *fields, mean, count = sample_statistics_op(logits, target, None, None, -100, True)
        *same, empty, none = sample_statistics_op(logits, target, None, None, -100, False)
    assert mean.shape == count.shape == () and empty.shape == none.shape == (0,)
    assert mean.dtype == count.dtype == empty.dtype == none.dtype == fields[3].dtype
    assert count.item() == (target != -100).sum().item()
    exact = fields[3].double().sum() / count.item()
    torch.testing.assert_close(mean.double(), exact, rtol=4 * torch.finfo(mean.dtype).eps, atol=0)
    assert all(map(torch.equal, fields, same))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [None, 5.0])
def test_the_gradient_of_the_mean_is_that_of_equal_losses(device, dtype, which, count):
    logits, target = random_logits(device, dtype, rows=30)
    fields = sample_statistics_op(logits, target, None, None, -100, False)
    saved = [fields[index] for index in (1, 4, 5, 10, 11)]
    number = fields[3].new_tensor(0.75)
    size = None if count is None else fields[3].new_tensor(count)
    each = (number / (count or 1)).expand(30)
    losses = fields[3].new_ones(30)
    with implementation(which):
        for given in (None, losses):
            total = each if given is None else each + given
            none = [None, None]
            actual = sample_statistics_gradient_op(
                logits, target, *saved, None, None, given, *none, number, size, -100
            )
            expected = sample_statistics_gradient_op(
                logits, target, *saved, None, None, total, *none, *none, -100
            )
            torch.testing.assert_close(actual, expected)


def test_mean_and_losses_come_from_one_function(batch):
    logits, target = batch
    statistics = marginops.sample_statistics(logits, target)
    mean = statistics.mean_loss()
    assert mean.grad_fn is statistics.loss.grad_fn
    weights = torch.rand(40, dtype=torch.float64, device=logits.device)
    together = gradient(
        3 * mean + (weights * statistics.loss).sum() + statistics.entropy.sum(), logits
    )
    losses = F.cross_entropy(logits, target, reduction="none")
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1)[target != -100].sum()
    plain = 3 * F.cross_entropy(logits, target) + (weights * losses).sum() + entropy
    torch.testing.assert_close(together, gradient(plain, logits))


def test_a_change_of_the_losses_changes_their_mean(batch):
    logits, target = batch

    def statistics():
        return marginops.sample_statistics(logits, target)

    expected = F.cross_entropy(logits, target)
    changed = statistics()
    changed.loss.mul_(2)
    torch.testing.assert_close(changed.mean_loss(), 2 * expected)
    torch.testing.assert_close(
        gradient(changed.mean_loss(), logits), gradient(2 * expected, logits)
    )

    fewer = statistics()
    kept = fewer.counted & (torch.arange(40, device=logits.device) < 20)
    loss = torch.where(kept, fewer.loss, 0)
    half = F.cross_entropy(logits[:20], target[:20])
    torch.testing.assert_close(fewer._replace(loss=loss, counted=kept).mean_loss(), half)
    torch.testing.assert_close(
        fewer._replace(counted=kept).mean_loss(), fewer.loss.sum() / kept.sum()
    )
    fewer.counted.copy_(kept)
    torch.testing.assert_close(fewer.mean_loss(), fewer.loss.sum() / kept.sum())


def test_a_change_of_the_mean_does_not_change_the_next_one(batch):
    logits, target = batch
    statistics = marginops.sample_statistics(logits, target)
    mean = statistics.mean_loss()
    mean /= 4
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(statistics.mean_loss(), expected)
    torch.testing.assert_close(gradient(statistics.mean_loss(), logits), gradient(expected, logits))


def test_the_mean_is_differentiable_where_the_losses_are(batch):
    statistics = marginops.sample_statistics(*batch)
    statistics.mean_loss().detach_()
    assert statistics.mean_loss().requires_grad
    statistics.loss.detach_()
    assert not statistics.mean_loss().requires_grad
    with torch.no_grad():
        statistics = marginops.sample_statistics(*batch)
    statistics.loss.requires_grad_()
    assert gradient(statistics.mean_loss(), statistics.loss).any()


def test_hooks_and_gradients_of_the_losses_see_the_mean(batch):
    logits, target = batch
    share = (target != -100) / (target != -100).sum()
    kept = marginops.sample_statistics(logits, target)
    kept.loss.retain_grad()
    kept.mean_loss().backward()
    torch.testing.assert_close(kept.loss.grad[target != -100], share[share > 0].double())
    hooked = marginops.sample_statistics(logits, target)
    hooked.loss.register_hook(lambda grad: 0 * grad)
    assert not gradient(hooked.mean_loss(), logits).any()


def test_without_gradient_and_without_samples(batch):
    logits, target = batch
    with torch.no_grad():
        alone = marginops.sample_statistics(logits, target).mean_loss()
    assert not alone.requires_grad
    torch.testing.assert_close(alone, F.cross_entropy(logits, target).detach())
    for given in (logits, logits.detach()):
        with torch.inference_mode():
            inferred = marginops.sample_statistics(given, target).mean_loss()
        torch.testing.assert_close(inferred, alone)
    nothing = marginops.sample_statistics(logits, torch.full_like(target, -100)).mean_loss()
    assert math.isnan(nothing.item())
    assert not gradient(nothing, logits).any()


def test_second_derivatives_of_the_mean_are_errors(batch):
    logits, target = batch
    mean = marginops.sample_statistics(logits, target).mean_loss()
    (first,) = torch.autograd.grad(mean, logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        first.square().sum().backward()


def test_the_mean_compiles_to_one_graph(batch):
    logits, target = batch

    def step(logits, target):
        return marginops.sample_statistics(logits, target).mean_loss()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, target), step(logits, target))
    torch.testing.assert_close(
        gradient(compiled(logits, target), logits), gradient(step(logits, target), logits)
    )


def test_a_mode_and_a_subclass_see_the_op(batch):
    """Calls that skip the dispatcher must not hide an op from what watches it."""
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    logits, target = batch
    with Watch():
        marginops.sample_statistics(logits, target)
    assert OPS.sample_statistics.default in seen
    seen.clear()
    marginops.sample_statistics(logits.as_subclass(Watched), target)
    assert OPS.sample_statistics.default in seen
