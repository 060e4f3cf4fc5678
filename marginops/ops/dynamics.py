"""The op behind :class:`marginops.training.TrainingDynamics`."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._library import Op

VALUES = (
    "margin",
    "score",
    "loss",
    "margin_average",
    "margin_mean",
    "confidence_mean",
    "confidence_m2",
    "el2n_mean",
)
COUNTS = ("count", "correct", "learnt", "forgotten")
_ROW_BITS = 32
_LAST_ROW = 2**_ROW_BITS - 1


class DynamicsState(NamedTuple):
    """What is known of N samples: 56 bytes a sample and two counters.

    Attributes:
        values: ``[N, 8]`` float32, the columns :data:`VALUES`. The first three are those of the
            last visit. ``confidence_m2`` is the sum of squared deviations from the mean.
        counts: ``[N, 4]`` int32, the columns :data:`COUNTS`. ``learnt`` and ``forgotten`` count the
            changes from not correct to correct and back. Before its first visit a sample is not
            correct. So ``learnt - forgotten`` is 1 if the sample was correct at its last visit,
            else 0.
        last_seen: ``[N]`` int64, -1 for a sample that was never seen, else
            ``step * 2**32 + (2**32 - 1 - row)`` for the step and the row of its last visit.
        totals: ``[2]`` int64, the number of steps so far, and the number of visits with values that
            are not finite.
    """

    values: Tensor
    counts: Tensor
    last_seen: Tensor
    totals: Tensor


def empty_state(num_samples: int, device: torch.device | str = "cpu") -> DynamicsState:
    """The state of samples that were never seen."""
    return DynamicsState(
        torch.zeros(num_samples, len(VALUES), dtype=torch.float32, device=device),
        torch.zeros(num_samples, len(COUNTS), dtype=torch.int32, device=device),
        torch.full((num_samples,), -1, dtype=torch.int64, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )


class UpdateDynamicsOp(Op):
    """Add a batch of B samples to a :class:`DynamicsState`, in place.

    The op reads the step from ``totals`` and adds one to it. It leaves out the rows that are not
    counted. If several counted rows have the same index, the first of them counts. Every value is
    rounded to float32 first. A row whose margin, confidence or EL2N is not finite then only changes
    the values of the last visit and ``totals[1]``.
    """

    schema = (
        "update_dynamics(Tensor(a!) values, Tensor(b!) counts, Tensor(c!) last_seen,"
        " Tensor(d!) totals, Tensor indices, Tensor margin, Tensor score, Tensor loss,"
        " Tensor confidence, Tensor el2n, Tensor correct, Tensor counted, float decay) -> ()"
    )

    @staticmethod
    def reference(
        values: Tensor,
        counts: Tensor,
        last_seen: Tensor,
        totals: Tensor,
        indices: Tensor,
        margin: Tensor,
        score: Tensor,
        loss: Tensor,
        confidence: Tensor,
        el2n: Tensor,
        correct: Tensor,
        counted: Tensor,
        decay: float,
    ) -> None:
        samples = last_seen.shape[0]
        is_inside = (indices >= 0) & (indices < samples)
        if indices.is_cuda:
            torch._assert_async(is_inside.all())
        elif not is_inside.all():
            wrong = indices[~is_inside][0].item()
            raise RuntimeError(f"indices: expected values in [0, {samples}), got {wrong}")
        numbers = torch.stack((margin, score, loss, confidence, el2n), 1).float()

        # The first counted row of a sample has the largest key.
        row = torch.arange(len(indices), device=indices.device)
        key = torch.where(counted, (totals[0] << _ROW_BITS) + (_LAST_ROW - row), -1)
        last_seen.scatter_reduce_(0, indices, key, "amax")
        is_first = counted & (last_seen[indices] == key)
        sample, numbers, correct = indices[is_first], numbers[is_first], correct[is_first]
        values[sample, :3] = numbers[:, :3]
        is_finite = numbers[:, [0, 3, 4]].isfinite().all(1)
        totals += torch.stack((torch.ones_like(totals[0]), (~is_finite).sum()))

        sample, numbers, correct = sample[is_finite], numbers[is_finite], correct[is_finite]
        margin, score, loss, confidence, el2n = numbers.unbind(1)
        count, num_correct, learnt, forgotten = counts[sample].unbind(1)
        _, _, _, average, margin_mean, confidence_mean, m2, el2n_mean = values[sample].unbind(1)
        was_correct = learnt - forgotten == 1
        average = torch.where(count == 0, margin, decay * average + (1 - decay) * margin)
        count = count + 1
        margin_mean = margin_mean + (margin - margin_mean) / count
        step = confidence - confidence_mean
        confidence_mean = confidence_mean + step / count
        m2 = m2 + step * (confidence - confidence_mean)
        el2n_mean = el2n_mean + (el2n - el2n_mean) / count
        values[sample, 3:] = torch.stack((average, margin_mean, confidence_mean, m2, el2n_mean), 1)
        changes = correct, correct & ~was_correct, ~correct & was_correct
        added = torch.stack([change.int() for change in changes], 1)
        counts[sample] = torch.cat(
            (count.unsqueeze(1), torch.stack((num_correct, learnt, forgotten), 1) + added), 1
        )

    @staticmethod
    def fake(*_: Tensor | float) -> None:
        """The op changes the state in place and returns nothing."""


update_dynamics_op = UpdateDynamicsOp()
