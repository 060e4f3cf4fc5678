"""Training dynamics of a batch: the op, and a whole training loss with it, against PyTorch."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import marginops
from bench_margin import make_logits
from conftest import DEVICE
from marginops.ops.dynamics import empty_state, update_dynamics_op
from marginops.training import TrainingDynamics

SAMPLES = 60_000
SHAPES = [(128, 10), (128, 1000), (8192, 1000)]
DECAY = 0.5


class EagerDynamics:
    """The same numbers of each sample in separate tensors, as a user would write them."""

    def __init__(self) -> None:
        names = ("margin", "score", "loss", "average", "margin_mean", "confidence", "m2", "el2n")
        self.values = {name: torch.zeros(SAMPLES, device=DEVICE) for name in names}
        self.counts = {
            name: torch.zeros(SAMPLES, dtype=torch.int32, device=DEVICE)
            for name in ("count", "correct", "learnt", "forgotten")
        }

    def update(self, indices: Tensor, statistics: marginops.SampleStatistics) -> None:
        """Add a batch in which each sample stands once and every value is finite."""
        margin, confidence, el2n = (
            value.detach() for value in (statistics.margin, statistics.confidence, statistics.el2n)
        )
        values, counts, correct = self.values, self.counts, statistics.correct
        values["margin"][indices] = margin
        values["score"][indices] = statistics.top2_margin
        values["loss"][indices] = statistics.loss.detach()
        count = counts["count"][indices] + 1
        counts["count"][indices] = count
        average = DECAY * values["average"][indices] + (1 - DECAY) * margin
        values["average"][indices] = torch.where(count == 1, margin, average)
        for name, value in (("margin_mean", margin), ("el2n", el2n)):
            mean = values[name][indices]
            values[name][indices] = mean + (value - mean) / count
        mean = values["confidence"][indices]
        step = confidence - mean
        mean = mean + step / count
        values["confidence"][indices] = mean
        values["m2"][indices] += step * (confidence - mean)
        was_correct = counts["learnt"][indices] - counts["forgotten"][indices] == 1
        changes = {
            "correct": correct,
            "learnt": correct & ~was_correct,
            "forgotten": ~correct & was_correct,
        }
        for name, change in changes.items():
            counts[name][indices] += change.int()


def make_batch(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = make_logits(rows, classes, torch.float32)
    indices = torch.randperm(SAMPLES, device=DEVICE)[:rows]
    return indices, logits, torch.randint(classes, (rows,), device=DEVICE)


@pytest.mark.parametrize("provider", ["marginops", "eager"])
@pytest.mark.parametrize("rows", [128, 8192])
def bench_update_dynamics(time_call, rows, provider):
    indices, logits, target = make_batch(rows, 10)
    statistics = marginops.sample_statistics(logits, target)
    state, eager = empty_state(SAMPLES, DEVICE), EagerDynamics()
    fields = (
        *(statistics.margin, statistics.top2_margin, statistics.loss, statistics.confidence),
        *(statistics.el2n, statistics.correct, statistics.counted),
    )

    calls = {
        "marginops": lambda: update_dynamics_op(*state, indices, *fields, DECAY),
        "eager": lambda: eager.update(indices, statistics),
    }
    call = calls.pop(provider)
    (other,) = calls.values()

    def check(_: None) -> None:
        other()
        for column, name in ((0, "margin"), (3, "average"), (4, "margin_mean"), (7, "el2n")):
            torch.testing.assert_close(state.values[:, column], eager.values[name])

    time_call(
        call,
        check,
        op="update_dynamics",
        shape=f"{rows} of {SAMPLES}",
        dtype="float32",
        provider=provider,
        bytes_read=rows * 56,
        other_bytes=rows * (56 + 30),
    )


@pytest.mark.parametrize("provider", ["marginops", "statistics", "cross_entropy", "eager"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_training_loss(time_call, shape, provider):
    """The loss and its gradient, alone or with all statistics of the samples kept in a state."""
    indices, logits, target = make_batch(*shape)
    logits.requires_grad_()
    dynamics, eager = TrainingDynamics(SAMPLES, device=DEVICE), EagerDynamics()

    def with_eager_state() -> Tensor:
        statistics = marginops.sample_statistics(logits, target)
        eager.update(indices, statistics)
        return statistics.mean_loss()

    loss = {
        "marginops": lambda: dynamics.update(indices, logits, target).mean_loss(),
        "statistics": lambda: marginops.sample_statistics(logits, target).mean_loss(),
        "cross_entropy": lambda: cross_entropy(logits, target),
        "eager": with_eager_state,
    }[provider]

    def call() -> Tensor:
        logits.grad = None
        loss().backward()
        return logits.grad

    (expected,) = torch.autograd.grad(cross_entropy(logits, target), logits)
    time_call(
        call,
        lambda result: torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6),
        op="training loss",
        shape=" x ".join(map(str, shape)),
        dtype="float32",
        provider=provider,
        bytes_read=logits.numel() * logits.element_size(),
        other_bytes=logits.numel() * logits.element_size(),
    )
