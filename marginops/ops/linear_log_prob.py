"""The log-probability of every target under a linear head, without the matrix of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from .linear_arguments import checked_linear_head
from .linear_statistics import head_statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@overload
def linear_log_prob(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[False] = False,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor: ...


@overload
def linear_log_prob(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: Literal[True],
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_log_prob(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    ignore_index: int = -100,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-probability of every target, such as the next token of a text, without logits.

    Let :math:`f = (h W^\top + b) / T` be the logits of a sample at the temperature T, and y its
    target:

    .. math::

        \log p_y = f_y - \log \sum_c e^{f_c}, \qquad
        \mathrm{entropy} = -\sum_c p_c \log p_c

    The result equals ``(F.linear(input, weight, bias) / temperature).log_softmax(-1)`` at the
    targets, up to rounding.

    Args:
        input: ``[N, D]`` or ``[..., N, D]``, such as hidden states ``[B, T, D]``; see
            :func:`marginops.linear_classification_margin`.
        weight: ``[C, D]``, C >= 2, such as the weight of the layer that gives the logits of a
            vocabulary; see :func:`marginops.linear_classification_margin`.
        target: ``[N]`` or ``[..., N]`` int64, classes in [0, C) or ``ignore_index``.
        bias: ``[C]``.
        temperature: The positive number T that divides the logits. Features and bias are divided
            by it in their own dtype.
        return_entropy: Whether to return the entropy as well.
        ignore_index: Samples with this target have log-probability 0, entropy 0 and no gradient.
        chunk_bytes: The size of the buffer for logits, see
            :func:`marginops.linear_classification_margin`.
        group: The processes that share the head, see
            :func:`marginops.linear_classification_margin`.

    Returns:
        The log-probabilities, or the pair of log-probabilities and entropies with
        ``return_entropy``. They are in nats and in the shape of ``target``, float64 for float64
        input, else float32. A row whose logits have a NaN, or whose largest logit is infinite, has
        NaN.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape, device or range, or the
            arguments of the ranks of ``group`` disagree. If one rank raises, all ranks raise.
        RuntimeError: A target is outside [0, C), on the CPU or with ``group``. On CUDA without
            ``group`` this is a device-side assertion.

    Both results are differentiable (once) in ``input``, ``weight`` and ``bias``. The backward pass
    computes the logits again, tile by tile, in a buffer of ``chunk_bytes``. The result is
    deterministic. Beside the result the function needs O(N) memory and ``chunk_bytes``, and a copy
    of ``input`` if T is not 1. :func:`marginops.linear_sample_statistics` computes the same values
    at T = 1, and with them whether a target has the largest logit.

    Example:
        >>> features, weight = torch.tensor([[[1.0, 2.0], [0.5, -1.0]]]), torch.eye(2)
        >>> marginops.linear_log_prob(features, weight, torch.tensor([[1, 1]]))
        tensor([[-0.3133, -1.7014]])
        >>> log_prob, entropy = marginops.linear_log_prob(
        ...     features, weight, torch.tensor([[1, 1]]), temperature=2.0, return_entropy=True
        ... )
        >>> entropy
        tensor([[0.6628, 0.6275]])
    """
    head = checked_linear_head(
        "linear_log_prob",
        (input, weight, bias),
        chunk_bytes,
        group,
        labels=(target, ignore_index),
        temperature=temperature,
    )
    statistics = head_statistics(head)
    log_prob = 0 - statistics.loss  # -0.0 would be the log-probability of ignored samples otherwise
    return (log_prob, statistics.entropy) if return_entropy else log_prob
