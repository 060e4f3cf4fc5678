"""Checks the arguments of the functions of a linear head, and converts them."""

from __future__ import annotations

from typing import Any

from .. import _checks as checks
from .arguments import (
    as_log_norm,
    check_bias_in_norm,
    check_classes,
    check_k,
    check_linear,
    check_temperature,
)
from .distributed_head import local_head
from .linear_head import ONE_PROCESS, LinearHead
from .margin import RIVALS
from .shard import open_shard
from .tiles import check_chunk_bytes


def checked_linear_head(
    function: str,
    layer: tuple[Any, Any, Any],
    chunk_bytes: Any,
    group: Any,
    *,
    labels: tuple[Any, Any] | None = None,
    log_norm: Any = None,
    temperature: Any = 1,
    rival: Any = "top2",
    bias_in_norm: Any = False,
    selects: bool = False,
    k: Any = None,
) -> LinearHead:
    """Check the arguments of a function, on all ranks of its group if it has one.

    Args:
        function: The name of the function, which has to be the same on all ranks.
        layer: Features, weight and bias.
        chunk_bytes: The size of the buffer for logits in bytes, or None.
        group: The processes that share the head, or None.
        labels: Targets and ``ignore_index``; None for a score.
        log_norm: The logarithm that scales margins.
        temperature: What logits are divided by.
        rival: Which class a score compares.
        bias_in_norm: Whether the bias is part of the norm of a score.
        selects: Whether the function selects ``k`` rows. The features are [N, D] then, and may be
            [..., N, D] otherwise.
        k: How many rows the function selects.

    Returns:
        The head. It holds the local part of a DTensor, and the features as a matrix.
    """
    input, weight, bias = layer
    target, ignore_index = (None, -100) if labels is None else labels
    if not checks.is_ordinary(weight):
        input, weight, bias, group, target = local_head(input, weight, bias, group, target)

    def check() -> LinearHead:
        dtype = check_linear(input, weight, bias, or_more=not selects)
        if group is None:  # a rank may have fewer classes
            check_classes(weight)
        check_chunk_bytes(chunk_bytes, weight, dtype)
        if labels is None:
            checks.check_choice("rival", rival, RIVALS)
            if group is not None and rival == "nearest":
                raise ValueError('rival: expected "top2" with group, got "nearest"')
            check_bias_in_norm(bias, bias_in_norm)
        else:
            checks.check_target(target, input, ignore_index, "input", dims=input.dim() - 1)
            check_temperature(temperature)
        # A view, or a copy if there is no view. The matrix product takes much longer than it.
        features, offset = input if input.dim() == 2 else input.flatten(0, -2), bias
        if temperature != 1:
            # Features and bias are divided instead of the logits, which have more elements.
            features = features / temperature
            offset = None if bias is None else bias / temperature
        return LinearHead(
            features,
            weight,
            offset,
            None if target is None else target.flatten(),
            as_log_norm(log_norm, input),
            check_k(k, input.size(0), "rows of input") if selects else None,
            ignore_index,
            bool(bias_in_norm),
            rival == "nearest",
            dtype,
            chunk_bytes,
            ONE_PROCESS,
            input.shape[:-1],
        )

    if group is None:
        return check()
    return open_shard(group, check, function=function, temperature=temperature)
