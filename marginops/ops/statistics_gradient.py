"""The gradient of the sample statistics in the logits."""

from typing import Any

import torch
from torch import Tensor

from .._checks import result_dtype
from . import margin_pair as pairs
from ._batches import Batch
from ._library import Op


class SampleStatisticsGradientOp(Op):
    """The gradient of the statistics in the logits.

    The gradient of a field counts as zeros if it is None. The gradient of the mean loss is divided
    by ``num_counted``. The op ignores a target or rival outside the classes of ``logits``: the call
    for another piece of the row handles it.
    """

    schema = (
        "sample_statistics_gradient(Tensor logits, Tensor target, Tensor rival, Tensor confidence,"
        " Tensor entropy, Tensor maximum, Tensor log_sum, Tensor? log_norm, Tensor? grad_margin,"
        " Tensor? grad_loss, Tensor? grad_confidence, Tensor? grad_entropy, Tensor? grad_mean_loss,"
        " Tensor? num_counted, int ignore_index) -> Tensor"
    )
    row_arguments = (
        *("logits", "target", "rival", "confidence", "entropy", "maximum", "log_sum"),
        *("grad_margin", "grad_loss", "grad_confidence", "grad_entropy"),
    )

    def call_batch(self, batch: Batch) -> Tensor | None:
        """Give each row what is one value for each element of the batch."""
        values = batch.values
        margin, loss, mean, count = (
            values[name] for name in ("grad_margin", "grad_loss", "grad_mean_loss", "num_counted")
        )
        if "log_norm" in batch.names:
            if margin is not None:
                margin = pairs.normalize(margin, values["log_norm"].unsqueeze(1))
                batch = batch.replace_each(grad_margin=margin)
            batch = batch.replace(log_norm=None)
        if batch.names & {"grad_mean_loss", "num_counted"}:
            if mean is not None:
                share = mean if count is None else mean / count
                share = share.unsqueeze(1).expand(batch.size, values["maximum"].shape[-1])
                batch = batch.replace_each(grad_loss=share if loss is None else loss + share)
            batch = batch.replace(grad_mean_loss=None, num_counted=None)
        return super().call_batch(batch)

    @staticmethod
    def reference(
        logits: Tensor,
        target: Tensor,
        rival: Tensor,
        confidence: Tensor,
        entropy: Tensor,
        maximum: Tensor,
        log_sum: Tensor,
        log_norm: Tensor | None,
        grad_margin: Tensor | None,
        grad_loss: Tensor | None,
        grad_confidence: Tensor | None,
        grad_entropy: Tensor | None,
        grad_mean_loss: Tensor | None,
        num_counted: Tensor | None,
        ignore_index: int,
    ) -> Tensor:
        if grad_mean_loss is not None:
            share = grad_mean_loss if num_counted is None else grad_mean_loss / num_counted
            share = share.expand_as(maximum)
            grad_loss = share if grad_loss is None else grad_loss + share
        label, has_label = _column_index(target, logits)
        gradient = torch.zeros(logits.shape, dtype=result_dtype(logits.dtype), device=logits.device)
        if grad_loss is not None or grad_confidence is not None or grad_entropy is not None:
            dense = torch.zeros_like(confidence)
            if grad_loss is not None:
                dense = dense + grad_loss
            if grad_confidence is not None:
                dense = dense - grad_confidence * confidence
            log_p = (logits.to(dense.dtype) - maximum.unsqueeze(1)) - log_sum.unsqueeze(1)
            p = log_p.exp()
            # At the label the term is p - 1. expm1 is accurate where p is close to 1.
            own = log_p.gather(1, label)
            own = torch.where(has_label, own.expm1(), own.exp())
            gradient = p.scatter(1, label, own) * dense.unsqueeze(1)
            if grad_entropy is not None:
                surprise = torch.where(p == 0, 0, log_p + entropy.unsqueeze(1))
                gradient = gradient - p * grad_entropy.unsqueeze(1) * surprise
        if grad_margin is not None:
            scaled = pairs.normalize(grad_margin, log_norm).unsqueeze(1)
            other, has_other = _column_index(rival, logits)
            gradient.scatter_add_(1, other, torch.where(has_other, -scaled, 0))
            gradient.scatter_add_(1, label, torch.where(has_label, scaled, 0))
        ignored = target == ignore_index
        return torch.where(ignored.unsqueeze(1), 0, gradient).to(logits.dtype)

    @staticmethod
    def fake(logits: Tensor, *_: Any) -> Tensor:
        return logits.new_empty(logits.shape)


sample_statistics_gradient_op = SampleStatisticsGradientOp()


def _column_index(classes: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each class as a column of the logits, and whether that column exists; both ``[N, 1]``.

    Where it does not exist, the index is 0.
    """
    exists = (classes >= 0) & (classes < logits.shape[1])
    return torch.where(exists, classes, 0).unsqueeze(1), exists.unsqueeze(1)
