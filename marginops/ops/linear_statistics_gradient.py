"""The gradient of the statistics of a linear head, which computes the logits again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import result_dtype
from ._batches import Batch
from ._library import Op
from .linear_head import Tensors, join
from .row_sums import IGNORED, classes_in_piece
from .statistics_gradient import sample_statistics_gradient_op
from .tiles import (
    check_rows,
    default_chunk_bytes,
    logit_tiles,
    pieces,
    row_bytes,
    tile_shape,
)


class LinearSampleStatisticsGradientOp(Op):
    """Gradients in input, weight and bias. The first two are empty unless they are needed.

    Targets and rivals are numbered over these classes. Others are NOT_IN_PIECE, and targets of
    ignored rows IGNORED.
    """

    schema = (
        "linear_sample_statistics_gradient(Tensor input, Tensor weight, Tensor? bias,"
        " Tensor target, Tensor rival, Tensor confidence, Tensor entropy, Tensor maximum,"
        " Tensor log_sum, Tensor? log_norm, Tensor? grad_margin, Tensor? grad_loss,"
        " Tensor? grad_confidence, Tensor? grad_entropy, ScalarType? dtype, int? chunk_bytes,"
        " bool needs_grad_input, bool needs_grad_weight)"
        " -> (Tensor, Tensor, Tensor)"
    )
    has_kernels = False

    def call_batch(self, batch: Batch) -> Tensors | None:
        """Compute the logits of several elements of the batch at once, as the buffer allows."""
        values = batch.values
        weight, bias = values["weight"], values["bias"]
        if batch.names & {"weight", "bias", "log_norm"}:
            return None
        columns = weight.to(values["dtype"] or weight.dtype)
        count = values["input"].shape[-2]
        half = (values["chunk_bytes"] or default_chunk_bytes(weight)) // 2
        elements = half // max(count * row_bytes(columns, None), 1)
        if elements == 0 or count == 0 or batch.size == 0:
            return None
        head = columns, None if bias is None else bias.to(columns.dtype)
        total = result_dtype(columns.dtype)
        # The same as for logits, with the features in their place.
        names = "input", *sample_statistics_gradient_op.row_arguments[1:]
        joined: list[Any] = [batch.joined(name) for name in names]
        parts = []
        for rows in pieces(batch.size * count, elements * count):
            values_of_rows: list[Any] = [
                value if value is None else value[rows] for value in joined
            ]
            input, *others = values_of_rows
            features = input.to(columns.dtype)
            grad_logits = sample_statistics_gradient_op(
                *(F.linear(features, *head), *others[:6], values["log_norm"], *others[6:]),
                *(None, None, IGNORED),
            ).unflatten(0, (-1, count))
            unused = grad_logits.new_empty(len(grad_logits), 0, 0)
            grad_input = grad_weight = unused
            if values["needs_grad_input"]:
                grad_input = grad_logits @ columns
            if values["needs_grad_weight"]:
                grad_weight = grad_logits.mT @ features.unflatten(0, (-1, count))
            parts.append((grad_input, grad_weight, grad_logits.sum(1, dtype=total)))
        grad_input, grad_weight, grad_bias = join(parts)
        return (
            grad_input.to(values["input"].dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(weight.dtype if bias is None else bias.dtype),
        )

    @staticmethod
    def reference(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
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
        dtype: torch.dtype | None,
        chunk_bytes: int | None,
        needs_grad_input: bool,
        needs_grad_weight: bool,
    ) -> Tensors:
        check_rows(input, target=target, rival=rival)
        check_rows(input, confidence=confidence, entropy=entropy, maximum=maximum, log_sum=log_sum)
        check_rows(
            input,
            grad_margin=grad_margin,
            grad_loss=grad_loss,
            grad_confidence=grad_confidence,
            grad_entropy=grad_entropy,
        )
        saved = confidence, entropy, maximum, log_sum
        grads = grad_margin, grad_loss, grad_confidence, grad_entropy
        columns = weight.to(dtype or weight.dtype)
        total = result_dtype(columns.dtype)
        grad_input = input.new_empty(input.shape if needs_grad_input else (0, 0))
        grad_weight = columns.new_zeros(columns.shape if needs_grad_weight else (0, 0), dtype=total)
        grad_bias = columns.new_zeros(columns.shape[0], dtype=total)
        if not len(weight):  # the classes of a process that has none
            return grad_input.zero_(), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)
        # The logits and their gradient exist at the same time, so each gets half of the buffer.
        half = (chunk_bytes or default_chunk_bytes(input)) // 2
        shape = tile_shape(input, columns, None, max(half, columns.dtype.itemsize))
        for rows, classes, logits in logit_tiles(input, columns, bias, columns.dtype, shape):
            local = torch.where(
                target[rows] == IGNORED, IGNORED, classes_in_piece(target[rows], classes)
            )
            grad_logits = sample_statistics_gradient_op(
                logits,
                local,
                classes_in_piece(rival[rows], classes),
                *(value[rows] for value in saved),
                log_norm,
                *(None if grad is None else grad[rows] for grad in grads),
                None,
                None,
                IGNORED,
            )
            if needs_grad_input:
                if classes.start == 0:
                    grad_rows = columns.new_zeros((len(logits), columns.shape[1]), dtype=total)
                _add_product(grad_rows, grad_logits, columns[classes])
                if classes.stop == len(columns):
                    grad_input[rows] = grad_rows
            if needs_grad_weight:
                _add_product(grad_weight[classes], grad_logits.t(), input[rows].to(columns.dtype))
            grad_bias[classes] += grad_logits.sum(0, dtype=total)
            del grad_logits  # otherwise two gradients would exist at the same time
        bias_dtype = weight.dtype if bias is None else bias.dtype
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)

    @staticmethod
    def fake(
        input: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *_, needs_grad_input, needs_grad_weight = others
        return (
            input.new_empty(input.shape if needs_grad_input else (0, 0)),
            weight.new_empty(weight.shape if needs_grad_weight else (0, 0)),
            weight.new_empty(weight.shape[:1]) if bias is None else bias.new_empty(bias.shape),
        )


linear_sample_statistics_gradient_op = LinearSampleStatisticsGradientOp()


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add the product of two matrices to ``total``, which is float32 for half precision."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total += one.mm(other)
